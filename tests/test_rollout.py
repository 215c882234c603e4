"""Rounds of answers: kept to the last bit, learned from once a pass, and credited as stated."""

from __future__ import annotations

import math
import re
import statistics
import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upweight.recipes.online as online
from oracles import gradients, loaded, random_trees, relative, tree_of
from upweight.data.pack import collate
from upweight.errors import OutputError
from upweight.models.frozen import Frozen
from upweight.models.load import LanguageModel
from upweight.models.logprobs import token_logps
from upweight.models.scalar import score_head, with_scalar_head
from upweight.recipes.state import State, Values, trained_modules
from upweight.training.loop import Hooks, Plan, Progress, fit
from upweight.training.objectives import Objective
from upweight.training.rollout import (
    Credit,
    Rollouts,
    Sizes,
    by_response,
    credited,
    num_rounds,
    ranked,
)
from upweight.training.round import SCHEMA, Round, Spent, read_round, spent_on, write_round
from upweight.types import ResponseId, RowId, Step, Tree

LISTS = ("logps", "reference_logps", "advantages", "values", "returns")


def known(trees, seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {
        i: scale * torch.randn(len(r), generator=draw)
        for tree in trees
        for i, r in zip(tree.ids, tree.responses, strict=True)
    }


def round_of(trees, number=1, beta=0.1, values=True, scores=None, stopped=None):
    """A round of these trees with random numbers in it."""
    if stopped is not None:
        flags = iter(stopped)
        trees = [replace(t, stopped=tuple(next(flags) for _ in t.responses)) for t in trees]
    ids = [i for tree in trees for i in tree.ids]
    if scores is None:
        scores = torch.randn(len(ids), generator=torch.Generator().manual_seed(9)).tolist()
    return Round(
        number=number,
        beta=beta,
        trees=tuple(trees),
        num_stopped=sum(sum(tree.stopped) for tree in trees),
        scores=dict(zip(ids, scores, strict=True)),
        logps=known(trees, 1),
        reference_logps=known(trees, 2),
        advantages=known(trees, 3),
        values=known(trees, 4) if values else None,
        returns=known(trees, 5) if values else None,
    )


# The file of a round

shapes = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)
fp32 = st.floats(width=32, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(shapes, st.booleans(), st.booleans(), st.data())
def test_a_round_that_is_read_back_is_the_round_that_was_written(drawn, values, rank, data):
    trees = [
        replace(
            tree_of(
                range(prompt),
                [range(n) for n in answers],
                [],
                line=1 + line // 2,  # a row drawn twice in a round, its answers numbered on
            ),
            ids=tuple(
                ResponseId(RowId("a file; b.jsonl", 1 + line // 2), 10 * (line % 2) + k)
                for k in range(len(answers))
            ),
            stopped=tuple(data.draw(st.booleans()) for _ in answers),
        )
        for line, (prompt, answers) in enumerate(drawn)
    ]
    num = sum(len(t.responses) for t in trees)
    made = round_of(
        trees,
        number=data.draw(st.integers(1, 10**6)),
        beta=data.draw(st.floats(0, 10)),
        values=values,
        scores=data.draw(st.lists(st.floats(allow_nan=False), min_size=num, max_size=num)),
    )
    first = next(iter(made.logps))
    made.logps[first][:] = torch.tensor(data.draw(fp32))
    counts = st.integers(0, 10**6)
    spent = Spent(data.draw(counts), data.draw(counts), data.draw(counts))
    made = replace(made, stop_penalty=data.draw(st.floats(0, 10)), spent=spent)
    if rank:
        made = ranked(made)
    with tempfile.TemporaryDirectory() as folder:
        write_round(Path(folder), made)
        again = read_round(Path(folder), made.number)
        assert again.spent == spent_on(Path(folder)) == spent
    assert (again.number, again.beta, again.trees) == (made.number, made.beta, made.trees)
    assert again.num_stopped == made.num_stopped
    assert again.stop_penalty == made.stop_penalty
    assert list(again.scores.items()) == list(made.scores.items())
    for name in LISTS:
        one, other = getattr(made, name), getattr(again, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert list(one) == list(other)
            assert all(torch.equal(one[i], other[i]) for i in one)


def test_what_is_read_of_answers_comes_in_the_order_of_their_trees():
    """As the round's file has it: intervals of a round that is read back are the same."""
    trees = [tree_of(range(n), [range(3)] * 2, [], line=n) for n in (2, 9, 1, 7, 3, 8)]
    found = by_response(lambda forest: torch.zeros(len(forest.scored)), trees, 18)
    assert list(found) == [i for tree in trees for i in tree.ids]


def test_what_rounds_took_is_added_up_and_of_an_older_file_counted(tmp_path):
    trees = random_trees([(3, 4, 1, 2), (2, 5, 5, 1)], seed=2)
    write_round(tmp_path, replace(round_of(trees), spent=Spent(12, 36, 400)))
    # One that does not say what was asked, and of whose prompts one has nothing to learn from.
    write_round(tmp_path, ranked(replace(round_of(trees, number=2), spent=Spent(7, 7, 50))))
    assert spent_on(tmp_path) == Spent(19, 43, 450)
    file = tmp_path / "round-000002.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["asked", "drawn"]), file)
    assert read_round(tmp_path, 2).spent == Spent(2, 6, 50)
    assert spent_on(tmp_path) == Spent(12 + 2, 36 + 6, 450)


def test_every_column_of_a_rounds_file_is_documented():
    page = Path(__file__).parents[1].joinpath("docs", "rollouts.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(cells)) == SCHEMA.names


def test_the_file_of_a_round_has_every_answer_that_was_drawn(tmp_path: Path):
    """Also those that are not learned from, which a person may ask about."""
    trees = random_trees([(3, 4, 1, 2), (2, 5, 5, 1)], seed=2)
    texts = {name: str(name) for tree in trees for name in tree.ids}
    asked = {tree.ids[0].row: f"the prompt of {tree.ids[0].row.line}" for tree in trees}
    made = ranked(replace(round_of(trees), texts=texts, prompt_texts=asked))
    assert sum(len(tree.ids) for tree in made.trees) < len(texts)
    write_round(tmp_path, made)
    rows = pq.read_table(tmp_path / "round-000001.parquet").to_pylist()
    answers = [(tuple(r["prompt"]), tuple(r["response"]), r["stopped"]) for r in rows]
    assert answers == [
        (tree.prompt, response, stopped)
        for tree in trees
        for response, stopped in zip(tree.responses, tree.stopped, strict=True)
    ]
    assert [row["text"] for row in rows] == list(texts.values())
    assert [row["prompt_text"] for row in rows] == [f"the prompt of {r['line']}" for r in rows]
    assert sum(row["tree"] is not None for row in rows) == sum(len(t.ids) for t in made.trees)


def test_a_round_whose_file_is_gone_says_so(tmp_path):
    with pytest.raises(OutputError, match="round-000003.parquet cannot be read .* Put it back"):
        read_round(tmp_path, 3)


# Which trees a step has


def rollouts(folder, prompts=5, per_round=3, passes=3, minibatches=2, **more) -> Rollouts:
    """Rounds in which every prompt is answered twice, `gap` nats a token from the reference."""
    gap = more.pop("gap", 0.0)

    def make(asked, number, beta):
        answered = [
            replace(tree, responses=((7, 8), (9,)), stopped=(True, False),
                    ids=tuple(ResponseId(tree.ids[0].row, 2 * slot + k) for k in range(2)))
            for slot, tree in enumerate(asked(number))
        ]  # fmt: skip
        made = round_of(answered, number, beta)
        return replace(made, logps={i: x + gap for i, x in made.reference_logps.items()})

    planted = [tree_of([n], [], [], line=n + 1) for n in range(prompts)]
    planted = [replace(t, ids=(ResponseId(RowId("p", t.prompt[0]), 0),)) for t in planted]
    sizes = Sizes(per_round, 2, 4, None, passes, minibatches, seed=11)
    return Rollouts(planted, sizes, folder, make, beta=0.1, **more)


def names(trees):
    return sorted((i.row.line, i.index) for tree in trees for i in tree.ids)


@pytest.mark.parametrize(("minibatches", "per_pass"), [(1, 1), (2, 2), (3, 3), (7, 3)])
def test_each_tree_is_in_one_step_of_each_pass_and_each_pass_has_its_own_order(
    tmp_path, minibatches, per_pass
):
    drawn = rollouts(tmp_path, minibatches=minibatches)
    asked = [[drawn.trees(step) for step in range(3 * per_pass)] for _ in range(2)]
    assert asked[0] == asked[1]
    assert drawn.now.number == 1
    passes = [asked[0][n * per_pass : (n + 1) * per_pass] for n in range(3)]
    for steps in passes:
        assert names(tree for trees in steps for tree in trees) == names(drawn.now.trees)
        assert max(map(len, steps)) - min(map(len, steps)) <= 1
    orders = {tuple(t.ids for trees in steps for t in trees) for steps in passes}
    assert len(orders) > 1
    drawn.trees(3 * per_pass)
    assert drawn.now.number == 2
    # Whoever goes back to the first round's file is given the same steps.
    again = rollouts(tmp_path, minibatches=minibatches)
    again.go_back({"round": 1, "begins": 0, "ends": 3 * per_pass, "beta": 0.1})
    assert [again.trees(step) for step in range(3 * per_pass)] == asked[0]


@given(prompts=st.integers(1, 9), per_round=st.integers(1, 7))
def test_every_prompt_is_asked_once_an_epoch(prompts, per_round):
    drawn = rollouts(Path("."), prompts=prompts, per_round=per_round)
    rounds = range(1, 1 + math.ceil(3 * prompts / per_round))
    rows = [t.ids[0].row.line for number in rounds for t in drawn.asked(number)]
    for epoch in range(3):
        assert sorted(rows[epoch * prompts : (epoch + 1) * prompts]) == list(range(prompts))
    if prompts > 4:
        assert len({tuple(rows[n * prompts : (n + 1) * prompts]) for n in range(3)}) > 1


def test_a_policy_that_went_too_far_ends_its_round_and_stays_so_when_resumed(tmp_path):
    drawn = rollouts(tmp_path, kl_stop=0.1)
    first = drawn.trees(0)
    drawn.after({"step": 1, "approx_kl": 0.09})
    second = drawn.trees(1)
    assert drawn.now.number == 1 and first != second
    drawn.after({"step": 2, "approx_kl": 0.11})
    resumed = rollouts(tmp_path, kl_stop=0.1)
    resumed.go_back(drawn.position())
    assert drawn.trees(2) == resumed.trees(2)
    assert (drawn.now.number, resumed.now.number) == (2, 2)
    assert drawn.position() == resumed.position() == {
        "round": 2, "begins": 2, "ends": 8, "beta": 0.1,
    }  # fmt: skip
    free = rollouts(tmp_path)
    free.trees(0)
    free.after({"step": 1, "approx_kl": 99.0})
    assert free.trees(1) and free.now.number == 1


def test_the_epoch_is_how_often_the_prompts_were_asked_also_where_rounds_end_early(tmp_path):
    drawn = rollouts(tmp_path, prompts=12, per_round=3, kl_stop=0.1, epochs=0.75)
    assert drawn.epoch(0) == 0
    drawn.trees(0)
    # Six steps a round, in which a quarter of the prompts is asked.
    assert [drawn.epoch(step) for step in (1, 3, 6)] == [0.25 / 6, 0.125, 0.25]
    drawn.after({"step": 2, "approx_kl": 0.2})
    assert drawn.epoch(2) == 0.25 and not drawn.is_done(2)
    drawn.trees(2)
    assert [drawn.epoch(step) for step in (3, 8)] == [0.25 + 0.25 / 6, 0.5]
    drawn.trees(8)
    assert not drawn.is_done(13) and drawn.is_done(14)
    drawn.after({"step": 9, "approx_kl": 0.2})
    assert drawn.is_done(9) and drawn.epoch(9) == 0.75
    back = rollouts(tmp_path, prompts=12, per_round=3, kl_stop=0.1, epochs=0.75)
    back.go_back(drawn.position())
    assert back.is_done(9) and back.epoch(9) == 0.75
    drawn.epochs = None
    assert not drawn.is_done(99)


@pytest.mark.parametrize(
    ("prompts", "per_round", "epochs", "rounds"),
    [(12, 4, 1.0, 3), (12, 5, 1.0, 3), (12, 5, 2.5, 6), (1, 16, 3.0, 1), (3, 1, 0.1 * 10, 3)],
)
def test_epochs_are_rounds_that_ask_every_prompt_so_often(prompts, per_round, epochs, rounds):
    assert num_rounds(prompts, per_round, epochs) == rounds


@pytest.mark.parametrize(("gap", "way"), [(4.0, 1), (-4.0, -1), (0.0, -1)])
def test_beta_follows_the_kl_of_the_round_before(tmp_path, gap, way):
    drawn = rollouts(tmp_path, kl_target=2.0, gap=gap)
    drawn.trees(0)
    assert drawn.now.beta == 0.1
    # Two answers of two tokens and one: 1.5 tokens an answer.
    assert drawn.now.kl == pytest.approx(1.5 * gap, abs=1e-5)
    drawn.trees(6)
    assert (drawn.beta - 0.1) * way > 0
    assert drawn.now.beta == drawn.beta
    back = rollouts(tmp_path, kl_target=2.0, gap=gap)
    back.go_back(drawn.position())
    assert back.beta == drawn.beta
    fixed = rollouts(tmp_path, gap=gap)
    fixed.trees(0), fixed.trees(6)
    assert fixed.beta == 0.1


# Credit

GROUPS = random_trees([(3, 4, 1, 2), (2, 5, 5, 1), (4, 2, 3, 6)], seed=2)
STOPPED = [True, False, True, True, True, False, False, True, True]
SCORES = [1.0, -2.0, 0.5, 3.0, 3.0, -1.0, 0.0, 4.0, 2.5]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_ppo_credits_each_token_as_the_definition_does(discount, trace):
    made = round_of(GROUPS, beta=0.3, scores=SCORES, stopped=STOPPED)
    made = replace(made, stop_penalty=0.75)
    options = dict(group=None, kl="k1", discount=discount, trace=trace)
    found = credited(made, Credit(**options, whiten=False))
    for (i, score), stopped in zip(made.scores.items(), STOPPED, strict=True):
        logps, reference, values = (
            getattr(made, name)[i].double().tolist()
            for name in ("logps", "reference_logps", "values")
        )
        rewards = [-0.3 * (p - q) for p, q in zip(logps, reference, strict=True)]
        rewards[-1] += score if stopped else score - 0.75
        wanted = [0.0] * len(rewards)
        later = 0.0
        for t in reversed(range(len(rewards))):
            next_value = values[t + 1] if t + 1 < len(values) else 0.0
            later = rewards[t] + discount * next_value - values[t] + discount * trace * later
            wanted[t] = later
        assert found.advantages[i].tolist() == pytest.approx(wanted, abs=1e-5)
        returns = [a + v for a, v in zip(wanted, values, strict=True)]
        assert found.returns[i].tolist() == pytest.approx(returns, abs=1e-5)
    whitened = credited(made, Credit(**options, whiten=True))
    flat, plain = (torch.cat(list(r.advantages.values())).double() for r in (whitened, found))
    spread = (plain - plain.mean()) / plain.std(correction=0)
    torch.testing.assert_close(flat, spread, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(whitened.returns[i], found.returns[i]) for i in found.returns)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", None])
@pytest.mark.parametrize("group", ["rloo", "grpo", "dr_grpo"])
def test_groups_credit_every_token_of_an_answer_as_the_definition_does(group, kl):
    made = round_of(GROUPS, beta=0.3, values=False, scores=SCORES, stopped=STOPPED)
    made = replace(made, stop_penalty=0.75)
    found = credited(made, Credit(group=group, kl=kl))
    assert found.returns is None
    estimate = {
        "k1": lambda x: x,
        "k2": lambda x: x * x / 2,
        "k3": lambda x: math.exp(-x) - 1 + x,
        None: lambda x: 0.0,
    }[kl]
    flags = iter(STOPPED)
    for tree in GROUPS:
        worth, earned, taken = [], [], []
        for i in tree.ids:
            gaps = (made.logps[i].double() - made.reference_logps[i].double()).tolist()
            stopped = next(flags)
            paid = made.scores[i] - (0.0 if stopped else 0.75)
            earned.append(paid)
            taken.append(0.3 * sum(map(estimate, gaps)))
            worth.append(paid - taken[-1])
        mean = sum(worth) / len(worth)
        spread, of_penalty = statistics.stdev(earned), statistics.stdev(taken)
        weight = spread**2 / (spread**2 + of_penalty**2)
        for k, i in enumerate(tree.ids):
            others = [w for j, w in enumerate(worth) if j != k]
            wanted = {
                "dr_grpo": worth[k] - mean,
                "grpo": (worth[k] - mean) * (weight / (spread + 1e-4) + 1 - weight),
                "rloo": worth[k] - sum(others) / len(others),
            }[group]
            length = len(made.logps[i])
            assert found.advantages[i].tolist() == pytest.approx([wanted] * length, abs=1e-4)


def test_ranked_keeps_the_best_and_the_worst_answer_and_no_others():
    scores = [1.0, 3.0, -2.0, 5.0, 5.0, 5.0, 0.0, 0.0, 7.0]
    found = ranked(round_of(GROUPS, values=False, scores=scores, stopped=STOPPED))
    assert [tree.ids for tree in found.trees] == [
        (GROUPS[0].ids[1], GROUPS[0].ids[2]),
        (GROUPS[2].ids[2], GROUPS[2].ids[0]),
    ]
    for tree, (whole, best, worst) in zip(
        found.trees, [(GROUPS[0], 1, 2), (GROUPS[2], 2, 0)], strict=True
    ):
        assert tree.prompt == whole.prompt
        assert tree.responses == (whole.responses[best], whole.responses[worst])
        (said,) = tree.preferences
        assert (said.chosen, said.rejected, said.weight) == (0, 1, 1.0)
    assert [tree.stopped for tree in found.trees] == [(False, True), (True, False)]
    assert len(found.scores) == 9


# Weights


def test_frozen_weights_are_in_place_for_the_block_and_leave_the_policy_untouched():
    lm, forest = loaded(), collate(GROUPS)
    frozen = Frozen.of(lm)
    with torch.no_grad():
        start = token_logps(lm, forest)
        for p in lm.model.parameters():
            p.add_(0.05)
        moved = token_logps(lm, forest)
    kept = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    places = {name: p.data_ptr() for name, p in lm.model.named_parameters()}
    assert not torch.allclose(start, moved, atol=1e-2)
    with torch.no_grad(), frozen.in_place(lm) as reference:
        assert torch.equal(token_logps(reference, forest), start)
    with pytest.raises(ZeroDivisionError), frozen.in_place(lm):
        raise ZeroDivisionError
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, kept[name]) and p.data_ptr() == places[name]
    with torch.no_grad():
        assert torch.equal(token_logps(lm, forest), moved)


def with_values(values: Values | None) -> State:
    """As much of a run as reading values takes."""
    state = object.__new__(State)
    state.values = values
    return state


def test_the_value_loss_reaches_the_policy_where_they_share_a_trunk_and_only_there():
    lm, forest = loaded(), collate(GROUPS)
    critic = with_scalar_head(deepcopy(lm), {2}, seed=1)
    own = with_values(Values(critic, critic.model))
    logps, values = online._read(own, lm, forest)
    assert values is not None and torch.equal(logps, token_logps(lm, forest))
    values.square().sum().backward()
    assert all(p.grad is None for p in lm.model.parameters())
    assert all(p.grad is not None for name, p in critic.model.named_parameters())

    head = nn.Linear(32, 1, bias=False)
    shared = with_values(Values(None, head))
    logps, values = online._read(shared, lm, forest)
    torch.testing.assert_close(logps, token_logps(lm, forest))
    assert values is not None
    found = gradients(lm.model, values.square().sum())
    moved = {name for name, slope in found.items() if slope.abs().max() > 0}
    assert any("layers.0" in name for name in moved)
    assert head.weight.grad is not None and head.weight.grad.abs().max() > 0


def test_a_value_model_far_off_does_not_clip_the_policys_update_away():
    """Plain descent at rate 1 moves each part by its own clipped gradient."""
    lm = loaded()
    critic = with_scalar_head(deepcopy(lm), {2}, seed=1)
    state = with_values(Values(critic, critic.model))

    def objective(size: float) -> Objective:
        def step(lm: LanguageModel, forest) -> Step:
            logps, values = online._read(state, lm, forest)
            assert values is not None
            loss = -logps.sum() + size * values.square().sum()
            return Step(loss, torch.tensor(1.0), {})

        return Objective("responses", lambda forest: 1.0, step)

    def moved(size: float) -> tuple[dict, dict, dict]:
        both = trained_modules(lm, state.values)
        before = {name: p.detach().clone() for name, p in both.named_parameters()}
        groups = [
            {"params": list(part.parameters()), "part": name}
            for name, part in (("policy", lm.model), ("value", critic.model))
        ]
        records = []
        hooks = Hooks(records.append, lambda progress: False, lambda progress: None)
        plan = Plan(1, 1, 1.0, 0.0, "constant", 0.5)
        fit(lm, torch.optim.SGD(groups, lr=1.0), objective(size), lambda step: [collate(GROUPS)],
            plan, hooks, Progress())  # fmt: skip
        steps = {name: before[name] - p.detach() for name, p in both.named_parameters()}
        with torch.no_grad():
            for name, p in both.named_parameters():
                p.copy_(before[name])
        policy = {name: x for name, x in steps.items() if name.startswith("policy.")}
        value = {name: x for name, x in steps.items() if name.startswith("value.")}
        return policy, value, records[0]

    def norm(parts: dict) -> float:
        return math.sqrt(sum(float(x.double().square().sum()) for x in parts.values()))

    small, large = moved(1.0), moved(1e4)
    assert relative(small[0], large[0]) < 1e-6
    for policy, value, record in (small, large):
        assert norm(policy) == pytest.approx(0.5, rel=1e-4)
        assert norm(value) == pytest.approx(0.5, rel=1e-4)
        assert record["grad_norm"] > 0.5 and record["grad_norm/value"] > 0.5
    assert large[2]["grad_norm/value"] == pytest.approx(1e4 * small[2]["grad_norm/value"], rel=1e-4)
    assert score_head(critic.model).weight.grad is None


# What a step is told


def test_what_is_known_of_a_round_comes_in_the_order_of_the_forests_tokens():
    made = round_of(GROUPS)
    mixed = [GROUPS[2], GROUPS[0]]
    found = made.experience(collate(mixed))
    for name in LISTS:
        wanted = torch.cat([getattr(made, name)[i] for tree in mixed for i in tree.ids])
        assert torch.equal(getattr(found, name), wanted)
    tree: Tree = GROUPS[1]
    alone = replace(tree, responses=tree.responses[1:2], ids=tree.ids[1:2], preferences=())
    assert torch.equal(made.experience(collate([alone])).logps, made.logps[tree.ids[1]])
