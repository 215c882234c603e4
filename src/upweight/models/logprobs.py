"""Hidden states -> log-probs of the scored tokens, without a logits tensor -> sums per response.

Only the positions that predict a scored token reach the head (head.py). Sums are fp32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from upweight.data.pack import collate, unshared
from upweight.errors import ModelError, Refusal, some_of
from upweight.models.attention import layout_of, native_attention
from upweight.models.head import at_least_fp32, head_logps, read
from upweight.models.load import LanguageModel
from upweight.types import Forest, PairLogps, sent


def token_logps(
    lm: LanguageModel,
    forest: Forest,
    chunk_elements: int | None = None,
    kept_elements: int | None = None,
) -> Float[Tensor, " scored"]:
    """log p(token | what it continues) in nats, fp32, for every scored token of the forest.

    In the order of forest.scored, whether the model shares prompts or runs one row per response.
    Differentiable; the caller decides with torch.no_grad(). Raises ModelError when the tokenizer
    has made an id that the model has no embedding for.
    """
    _require_known_ids(lm, forest)
    forest = forest.to(lm.device)
    if lm.plan.native_head:
        return _native_logps(lm, forest)
    hidden = scored_hidden(lm, forest)
    targets = forest.token_ids[forest.scored]
    return head_logps(lm, hidden, targets, chunk_elements, kept_elements)


def _require_known_ids(lm: LanguageModel, forest: Forest) -> None:
    known = lm.vocab_size
    # Read from the trees: asking a tensor on a GPU would wait for what runs there.
    for tree in forest.trees:
        for part in (tree.prompt, *tree.responses):
            if part and (largest := max(part)) >= known:
                token = lm.tokenizer.convert_ids_to_tokens(largest)
                raise ModelError(
                    f"{tree.ids[0].row if tree.ids else 'a prompt'} has token id {largest} "
                    f"({token}), and {lm.name} has embeddings for ids 0 to {known - 1}: its "
                    "tokenizer was given tokens that the model was not. Use the tokenizer that the "
                    "model was trained with, or a model whose embedding was resized to it."
                )


def scored_hidden(
    lm: LanguageModel, forest: Forest, *, after: bool = False
) -> Float[Tensor, "scored width"]:
    """The last hidden state (after the final norm) at the positions that predict scored tokens, or
    `after` them: at the tokens themselves."""
    deepest = max((span.depth for span in forest.spans), default=0)
    deep = lm.plan.exact_depth is not None and deepest > lm.plan.exact_depth
    if lm.plan.shared:
        # A row that is deep enough to change position scaling must not do so to its neighbours:
        # each is a forest of its own. (Not transformers' attention for the time being: layers that
        # are recomputed in the backward pass would find this one again.)
        trees = unshared(forest).trees if deep else ()
        alone = [collate([tree]).to(lm.device) for tree in trees] or [forest]
        return torch.cat([_forest_hidden(lm, row, after) for row in alone])
    with native_attention(lm.causal), lm.compute():
        pieces = [
            lm.causal.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state[where[0], where[1] + after]
            for ids, mask, where in _rows(lm, forest, 1 if deep else forest.num_tokens)
        ]
    return torch.cat(pieces)


def _forest_hidden(lm: LanguageModel, forest: Forest, after: bool) -> Float[Tensor, "scored width"]:
    with lm.compute():
        hidden = lm.causal.base_model(
            input_ids=forest.token_ids[None],
            position_ids=forest.position[None],
            use_cache=False,
            forest_layout=layout_of(forest, lm.plan.attention),
        ).last_hidden_state[0]
    return hidden[forest.scored if after else forest.predicted_at]


def _native_logps(lm: LanguageModel, forest: Forest) -> Float[Tensor, " scored"]:
    """Through the model's own forward, logits and all, a few rows at a time."""
    targets = forest.token_ids[forest.scored]
    pieces: list[Tensor] = []
    done = 0
    with native_attention(lm.causal), lm.compute():
        for ids, mask, where in _rows(lm, forest, max_tokens=1):
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[where]
            pieces.append(read(at_least_fp32(logits), targets[done : done + len(logits)]))
            done += len(logits)
    return torch.cat(pieces)


def _rows(
    lm: LanguageModel, forest: Forest, max_tokens: int
) -> list[tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"], tuple[Tensor, Tensor]]]:
    """Padded batches of one row per response, in response order.

    Each is (token ids, attention mask, index of the positions that predict its scored tokens).
    Padding is on the right, behind everything a causal model reads.
    """
    alone = unshared(forest)
    batches: list[list[int]] = []
    longest = 0
    for index, span in enumerate(alone.spans):
        longest = max(longest, span.stop - span.start)
        if not batches or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            longest = span.stop - span.start
        batches[-1].append(index)
    result: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]] = []
    for batch in batches:
        spans = [alone.spans[i] for i in batch]
        ids = [alone.token_ids[s.start : s.stop] for s in spans]
        row = [torch.full((sum(s.responses),), r) for r, s in enumerate(spans)]
        column = [torch.arange(s.prompt - 1, s.stop - s.start - 1) for s in spans]
        where = (sent(torch.cat(row), lm.device), sent(torch.cat(column), lm.device))
        # Any id that has an embedding: a tokenizer's own padding token may have none.
        padded = sent(pad_sequence(ids, batch_first=True, padding_value=0), lm.device)
        # Ones on the padding too: nothing reads it, and a padded position whose sliding window
        # holds only padding would be a softmax over nothing, whose NaN spreads as 0 * NaN.
        result.append((padded, torch.ones_like(padded), where))
    return result


def response_logps(tokens: Float[Tensor, " scored"], forest: Forest) -> Float[Tensor, " responses"]:
    """Log-prob of each response: the sum over its tokens, in nats.

    Raises Refusal UW105 for log-probs in half precision.
    """
    index = forest.response_of.to(tokens.device)
    if tokens.dtype not in (torch.float32, torch.float64):
        rows = list(dict.fromkeys(str(i.row) for tree in forest.trees for i in tree.ids))
        raise Refusal(
            "UW105",
            f"the log-probs of {len(tokens)} tokens are in "
            f"{str(tokens.dtype).removeprefix('torch.')}, in which the sum over a response is "
            "mostly rounding: float32 or float64 is summed. Code of your own that changes what "
            "token_logps gives must cast it back; if there is none, report it. "
            f"Rows: {some_of(rows)}.",
        )
    return tokens.new_zeros(forest.num_responses).index_add(0, index, tokens)


def pair_logps(
    policy: Float[Tensor, " scored"], reference: Float[Tensor, " scored"], forest: Forest
) -> PairLogps:
    """Per-token log-probs of policy and reference -> what a pair loss sees."""
    p, r = response_logps(policy, forest), response_logps(reference, forest)
    tokens, chosen, rejected = (
        x.to(p.device) for x in (forest.tokens_per_response, forest.chosen, forest.rejected)
    )
    return PairLogps(
        policy_chosen=p[chosen],
        policy_rejected=p[rejected],
        reference_chosen=r[chosen],
        reference_rejected=r[rejected],
        tokens_chosen=tokens[chosen],
        tokens_rejected=tokens[rejected],
        flipped=forest.flipped.to(p),
    )
