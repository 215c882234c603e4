"""The objectives on answers and scores: how a forest is packed or cut changes nothing."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from oracles import SHAPES, gradients, loaded, random_trees, relative, tree_of, with_plan
from tiny import FALLBACK_FAMILIES, FAMILIES
from upweight.data.pack import bins, collate, merge_same_prompts
from upweight.errors import ModelError
from upweight.losses import AGGREGATIONS, bradley_terry
from upweight.models.logprobs import token_logps
from upweight.models.scalar import (
    one_response_at_a_time,
    response_scores,
    score_head,
    state_values,
    tree_scores,
    with_scalar_head,
)
from upweight.training.objectives import Objective, Surrogate, policy_gradient, reward
from upweight.training.round import Round
from upweight.types import Tree

TREES = random_trees(SHAPES + ((3, 2, 2), (20, 1, 9)), seed=3)
ALONE = [tree_of(t.prompt, [r], ()) for t in TREES for r in t.responses]
ALONE = [
    Tree(a.prompt, a.responses, (), (i,), (True,))
    for a, i in zip(ALONE, [i for t in TREES for i in t.ids], strict=True)
]
FAMILY = ["llama", "gpt2"]
EXACT = {"llama": 1e-6, "gpt2": 1e-10}
"""RMSNorm is fp32 in a float64 model too (test_invariants.py)."""


def experience_near(lm, critic) -> Round:
    """A round whose policy was near this one, so that some tokens are clipped and some are not."""
    draw = torch.Generator().manual_seed(5)

    def noisy(read, size):
        found = {}
        for tree in TREES:
            forest = collate([tree])
            with torch.no_grad():
                flat = read(forest).float()
            flat = flat + size * torch.randn(flat.shape, generator=draw)
            pieces = flat.split(forest.tokens_per_response.tolist())
            found |= dict(zip(tree.ids, pieces, strict=True))
        return found

    def policy(forest):
        return token_logps(lm, forest)

    def values(forest):
        return state_values(critic, forest)

    def nothing(forest):
        return torch.zeros(len(forest.scored))

    return Round(
        number=1,
        beta=0.2,
        trees=tuple(TREES),
        num_stopped=0,
        scores={i: 0.0 for tree in TREES for i in tree.ids},
        logps=noisy(policy, 0.3),
        reference_logps=noisy(policy, 0.5),
        advantages=noisy(nothing, 1.0),
        values=noisy(values, 0.3),
        returns=noisy(values, 0.5),
    )


def objective_of(kind: str, aggregation: str, made: Round, critic) -> Objective:
    ppo = kind == "ppo"
    surrogate = Surrogate(
        clip_low=0.2,
        clip_high=0.28,
        aggregation=aggregation,
        max_tokens=16,
        kl=None if ppo else "k3",
        value_clip=0.2 if ppo else None,
    )

    def values(lm, forest):
        return token_logps(lm, forest), state_values(critic, forest) if ppo else None

    return policy_gradient(made.experience, surrogate, values, lambda: made.beta)


def slopes(lm, critic, objective: Objective, groups):
    """(mean loss, gradient of both models) of a step that is cut into these groups of trees."""
    both = nn.ModuleDict({"policy": lm.model, "value": critic.model})
    done = [objective.step(lm, collate(group)) for group in groups]
    for step, group in zip(done, groups, strict=True):
        assert float(step.count) == pytest.approx(objective.count(collate(group)))
    count = torch.stack([step.count for step in done]).sum()
    loss = torch.stack([step.loss_sum for step in done]).sum() / count
    return float(loss.detach()), gradients(both, loss)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize("family", FAMILY)
def test_packing_and_cutting_change_no_policy_gradient(family, kind, aggregation):
    lm = loaded(family, torch.float64)
    critic = with_scalar_head(loaded(family, torch.float64), {2}, seed=1)
    critic.model.to(torch.float64)
    objective = objective_of(kind, aggregation, experience_near(lm, critic), critic)
    wanted_loss, wanted = slopes(lm, critic, objective, [[tree] for tree in ALONE])
    size = sum(float(w.square().sum()) for w in wanted.values())
    assert size > 1e-4
    ways = [
        [TREES],
        [[tree] for tree in TREES],
        [TREES[:1], TREES[1:4], TREES[4:]],
        [TREES[3:], TREES[:3]],
        [merge_same_prompts(ALONE)],
        *(bins(TREES, capacity) for capacity in (1, 40, 60)),
    ]
    for groups in ways:
        loss, found = slopes(lm, critic, objective, groups)
        assert loss == pytest.approx(wanted_loss, abs=EXACT[family])
        assert relative(found, wanted) < EXACT[family]


@pytest.mark.parametrize("way", [dict(attention="tiles"), dict(shared=False, reason="a test")])
def test_the_path_of_attention_changes_no_policy_gradient(way):
    plain = loaded(dtype=torch.float64)
    critic = with_scalar_head(loaded(dtype=torch.float64), {2}, seed=1)
    critic.model.to(torch.float64)
    objective = objective_of("ppo", "token", experience_near(plain, critic), critic)
    wanted = slopes(plain, critic, objective, [[tree] for tree in ALONE])[1]
    lm = with_plan(plain, **way)
    assert relative(slopes(lm, critic, objective, [TREES])[1], wanted) < 1e-6


@pytest.mark.parametrize("family", FAMILY)
def test_packing_and_cutting_change_no_gradient_of_a_reward_model(family):
    lm = with_scalar_head(loaded(family, torch.float64), {2}, seed=1)
    lm.model.to(torch.float64)
    objective = reward(bradley_terry)
    pairs = [
        Tree(t.prompt, (t.responses[p.chosen], t.responses[p.rejected]), t.preferences[:1],
             (t.ids[p.chosen], t.ids[p.rejected]), (True, True))
        for t in TREES for p in t.preferences
    ]  # fmt: skip

    def slope(groups):
        done = [objective.step(lm, collate(group)) for group in groups]
        total = torch.stack([s.loss_sum for s in done]).sum()
        return gradients(lm.model, total / sum(float(s.count) for s in done))

    wanted = slope([[pair] for pair in pairs])
    for groups in ([TREES], [pairs], [TREES[:2], TREES[2:]], bins(TREES, 40)):
        assert relative(slope(groups), wanted) < EXACT[family]


# Scores

CLASSIFIED = ["llama", "gpt2", "qwen2", "gemma2"]


def judged(family: str) -> list[Tree]:
    """The trees without the padding token, at which transformers would end a response early."""
    return [
        Tree(tuple(x or 7 for x in t.prompt), tuple(tuple(x or 7 for x in r) for r in t.responses),
             t.preferences, t.ids, t.stopped)
        for t in TREES
    ]  # fmt: skip


@pytest.mark.parametrize("family", [*CLASSIFIED, "bloom", "falcon"])
def test_packed_scores_are_those_of_plain_transformers(family):
    lm = with_scalar_head(loaded(family), {2}, seed=1)
    trees = judged(family)
    config = deepcopy(lm.causal.config)
    config._attn_implementation = "eager"
    plain = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    plain.load_state_dict(lm.model.state_dict())
    wanted = [one_response_at_a_time(plain.eval(), tree) for tree in trees]
    flat = [score for scores in wanted for score in scores]
    assert max(flat) - min(flat) > 0.1
    for capacity in (1, 40, 10_000):
        for got, scores in zip(tree_scores(lm, trees, capacity), wanted, strict=True):
            assert got == pytest.approx(scores, abs=2e-5)
    alone = [
        response_scores(lm, collate([tree_of(t.prompt, [r], ())])).item()
        for t in trees
        for r in t.responses
    ]
    assert alone == pytest.approx(flat, abs=2e-5)
    # The value of a state is the score of the sequence that ends in it.
    short = tree_of(trees[0].prompt, [trees[0].responses[0][:1]], ())
    value = state_values(lm, collate([trees[0]]))[1].item()
    assert value == pytest.approx(one_response_at_a_time(plain, short)[0], abs=2e-5)


def test_a_family_without_a_scalar_head_is_refused_by_name():
    with pytest.raises(ModelError, match="family mamba, of which transformers has no sequence-cl"):
        with_scalar_head(loaded("mamba"), {2}, seed=0)


@pytest.mark.parametrize("family", [f for f in FAMILIES | FALLBACK_FAMILIES if f != "mamba"])
def test_every_family_has_a_linear_head_of_one_number_without_bias(family):
    try:
        lm = with_scalar_head(loaded(family), {2}, seed=0)
    except ModelError as error:
        assert f"the family {loaded(family).causal.config.model_type}" in str(error)
        return
    head = score_head(lm.model)
    assert head.weight.shape[0] == 1 and head.bias is None
    assert torch.isfinite(response_scores(lm, collate(TREES))).all()
