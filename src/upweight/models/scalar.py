"""A scalar head on the same trunk: a reward model scores responses, a value model scores states.

Both are transformers' sequence-classification model of the family with one label, so that what is
saved is read by plain transformers (and by everything that reads its reward models).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from upweight.errors import ModelError
from upweight.models.finite import finite
from upweight.models.load import LanguageModel, evaluation_mode, load
from upweight.models.logprobs import scored_hidden
from upweight.models.named import resolve
from upweight.models.reading import read_trees
from upweight.models.weights import SCORING, load_weights
from upweight.types import Forest, Tree

SPELLED_SPACES = ("\u0120", "\u2581")
"""How byte-level and SentencePiece vocabularies write a space that begins a token."""


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder holds a sequence-classification model with one label."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = config.get("architectures") or [""]
    return str(named[0]).endswith(SCORING) and len(config.get("id2label", "?")) == 1


def with_scalar_head(lm: LanguageModel, stop_ids: Collection[int], seed: int) -> LanguageModel:
    """`lm` with its output head replaced by a random linear map to one number, without bias.

    The trunk is `lm`'s own, not a copy. Weights are drawn from N(0, 1/(width + 1)) (Stiennon et al.
    2020, arXiv:2009.01325, appendix B.1). Raises ModelError for a family that transformers has no
    such model of.
    """
    config = copy.deepcopy(lm.causal.config)
    config.num_labels = 1
    config.pad_token_id = _padding(lm, stop_ids)
    try:
        with torch.device("meta"):
            # Only what is made here: an adapter's dropout and recomputed layers stay on.
            model = AutoModelForSequenceClassification.from_config(config).eval()
    except ValueError as error:
        raise ModelError(
            f"{lm.name} is of the family {config.model_type}, of which transformers has no "
            "sequence-classification model, so that no reward or value head can be put on it. Use "
            "a model of another family, such as llama or qwen2."
        ) from error
    inner = getattr(model, "score", None)
    assert isinstance(inner, nn.Linear), f"{type(model).__name__} has no linear score"
    width = inner.in_features
    head = nn.Linear(width, 1, bias=False, device=lm.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
        head.weight.copy_(drawn)
    setattr(model, model.base_model_prefix, lm.causal.base_model)
    model.score = head
    model.generation_config = None
    return replace(lm, model=model)


def _padding(lm: LanguageModel, stop_ids: Collection[int]) -> int | None:
    """A token that no response ends with: transformers reads the score at the last token that is
    not padding, and where that is the stop token it would read one too early.

    None is added: the model would have no embedding for it. Where every special token is a stop
    token it is the last ordinary one that begins with a space, as tokenizers spell it: no text
    holds that spelling, so that marking it changes no text's tokens.
    """
    tokenizer = lm.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1], reverse=True)
    candidates = [
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        *tokenizer.all_special_ids,
        *(i for text, i in vocabulary if text[:1] in SPELLED_SPACES),
    ]
    fits = (i for i in candidates if isinstance(i, int) and i not in stop_ids)
    return next((i for i in fits if i < lm.vocab_size), None)


def load_reward_model(
    name: str,
    adapt: Callable[[LanguageModel], LanguageModel] = lambda lm: lm,
    **options: Any,
) -> LanguageModel:
    """A reward model as `upweight train objective=reward` and others save it, ready for forests.

    How its trunk runs a forest is proved with the embedding in the place of an output head, and
    `adapt` may put an adapter on the trunk. `options` are those of load.load. Raises ModelError
    where the folder holds something else.
    """
    folder = resolve(name)
    if not is_reward_model(folder):
        raise ModelError(
            f"{name} is not a reward model: its config.json names no sequence-classification model "
            "with one label. Train one with objective=reward, and give its model folder."
        )
    scoring = load_weights(name, folder, options.get("trust_remote_code", False), scalar=True)
    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(scoring.config)
    setattr(causal, causal.base_model_prefix, scoring.base_model)
    embedding = next(scoring.get_input_embeddings().parameters())
    head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
    head.weight = embedding
    causal.set_output_embeddings(head)
    lm = adapt(load(name, weights=causal, **options))
    scoring.to(lm.device)  # pyright: ignore[reportArgumentType]
    return replace(lm, model=scoring)


def score_head(model: nn.Module) -> nn.Linear:
    """The head of a reward or value model, an adapter around it or not."""
    found = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == "score"]
    heads = [m for m in found if isinstance(m, nn.Linear)]
    assert heads, "the model has no scalar head"
    return heads[-1]


def response_scores(lm: LanguageModel, forest: Forest) -> Float[Tensor, " responses"]:
    """The score of each response: the head at its last token, which has read all of it. fp32."""
    forest = forest.to(lm.device)
    last = forest.tokens_per_response.cumsum(0) - 1
    hidden = scored_hidden(lm, forest, after=True)[last]
    return _apply(score_head(lm.model), hidden)


def state_values(lm: LanguageModel, forest: Forest) -> Float[Tensor, " scored"]:
    """The value of each scored token's state: the head at the token it continues. fp32."""
    return _apply(score_head(lm.model), scored_hidden(lm, forest.to(lm.device)))


def _apply(head: nn.Linear, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (hidden.to(exact) @ head.weight[0].to(exact)).to(exact)


def tree_scores(
    lm: LanguageModel,
    trees: Sequence[Tree],
    tokens_per_bin: int = 2048,
    on_smaller: Callable[[int], None] = lambda tokens_per_bin: None,
) -> list[list[float]]:
    """The score of every response of every tree, in the trees' order; `on_smaller` is told of bins
    that had to be halved."""
    where = {id(tree): i for i, tree in enumerate(trees)}
    result: list[list[float]] = [[] for _ in trees]
    asked = finite(response_scores, lm, "scores")
    with torch.no_grad(), evaluation_mode(lm):
        for forest, found in read_trees(asked, trees, tokens_per_bin, on_smaller):
            scores = found.tolist()
            for tree in forest.trees:
                result[where[id(tree)]] = scores[: len(tree.responses)]
                del scores[: len(tree.responses)]
    return result


def padding_tokenizer(lm: LanguageModel) -> PreTrainedTokenizerBase:
    """The tokenizer that is saved with a reward model: it pads with the token that the model's
    config names, behind the text, where absolute positions stay what they are."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.padding_side = "right"
    padding = lm.causal.config.pad_token_id
    if padding is None:
        tokenizer.pad_token = None
    elif padding != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def one_response_at_a_time(model: PreTrainedModel, tree: Tree) -> list[float]:
    """The oracle: transformers' own forward on each [prompt; response] alone."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            float(model(torch.tensor([[*tree.prompt, *r]], device=device)).logits[0, 0])
            for r in tree.responses
        ]


def in_one_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tree: Tree
) -> list[float]:
    """As `one_response_at_a_time`, all responses in one batch that the tokenizer pads."""
    rows = [[*tree.prompt, *response] for response in tree.responses]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch.to(next(model.parameters()).device)).logits[:, 0].tolist()
