import json
import math
import weakref
from dataclasses import replace

import pytest
import torch

from oracles import loaded, random_trees
from upweight.data.pack import bins, collate
from upweight.errors import ModelError, Refusal
from upweight.losses.pair import dpo
from upweight.models.adapter import add_lora
from upweight.models.load import fingerprint
from upweight.models.reference import fill, open_reference
from upweight.training import loop
from upweight.training.loop import Hooks, Plan, Progress, Window, fit, rehearse
from upweight.training.objectives import pair
from upweight.training.optimizer import make_optimizer

TREES = random_trees([(6, 3, 5), (4, 2, 2, 4), (5, 7, 1), (3, 4, 6), (8, 2, 3)] * 2, seed=7)


def objective_of(lm, root, trees=TREES, loss=dpo):
    reference = open_reference(fingerprint(lm), lm, root)
    fill(reference, lm, trees, 64)
    return pair(reference.logps, loss, beta=0.1)


def train(
    lm, root, cut, steps=2, loss=dpo, should_stop=lambda: False, to_keep=(), progress=None, **plan
):
    """(records, steps evaluated, steps saved, whether it ran to its end)"""
    objective = objective_of(lm, root, loss=loss)
    optimizer = make_optimizer(
        lm.model, learning_rate=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-3
    )
    options = dict(
        total_steps=steps, steps_per_epoch=steps, learning_rate=1e-2, warmup=0.0,
        schedule="constant", max_grad_norm=1.0,
    )  # fmt: skip
    records, evaluated, saved = [], [], []
    hooks = Hooks(
        on_record=records.append,
        evaluate=lambda progress: evaluated.append(progress.step) or progress.step in to_keep,
        save=lambda progress: saved.append(progress.step),
        should_stop=should_stop,
    )
    forests = [collate(TREES[a:b]) for a, b in cut]
    whole = Plan(**options | plan)
    done = fit(lm, optimizer, objective, lambda step: forests, whole, hooks, progress or Progress())
    return records, evaluated, saved, done


WHOLE = [(0, 10)]
EACH = [(i, i + 1) for i in range(10)]
RAGGED = [(0, 1), (1, 6), (6, 8), (8, 10)]


@pytest.mark.parametrize("cut", [EACH, RAGGED])
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(tmp_path, cut):
    whole, pieces = loaded(), loaded()
    wanted = train(whole, tmp_path / "a", WHOLE)[0]
    got = train(pieces, tmp_path / "b", cut)[0]
    for one, other in zip(wanted, got, strict=True):
        for key in one.keys() - {"kind", "seconds", "tokens_per_second"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
    for p, q in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_the_mean_over_all_pairs_of_the_step(tmp_path):
    # Adam and clipping would hide a factor; plain descent without either does not.
    lm, alone = loaded(), loaded()
    objective = objective_of(lm, tmp_path)
    before = [p.detach().clone() for p in lm.model.parameters()]
    descent = torch.optim.SGD(lm.model.parameters(), lr=1.0)
    hooks = Hooks(lambda record: None, lambda progress: False, lambda progress: None)
    plan = Plan(1, 1, 1.0, 0.0, "constant", None)
    forests = [collate(TREES[a:b]) for a, b in RAGGED]
    fit(lm, descent, objective, lambda step: forests, plan, hooks, Progress())

    whole = objective.step(alone, collate(TREES))
    num_pairs = sum(len(tree.preferences) for tree in TREES)
    assert float(whole.count) == num_pairs
    (whole.loss_sum / num_pairs).backward()
    for p, q, b in zip(lm.model.parameters(), alone.model.parameters(), before, strict=True):
        torch.testing.assert_close(b - p, q.grad, rtol=1e-4, atol=1e-7)


def test_the_first_step_costs_ln_2_and_the_loss_falls(tmp_path):
    records, *_ = train(loaded(), tmp_path, RAGGED, steps=4)
    losses = [record["loss"] for record in records]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses == sorted(losses, reverse=True)
    last = records[-1]
    assert last["step"] == 4 and last["epoch"] == 1.0 and last["kind"] == "train"
    assert last["num_pairs"] == sum(len(t.preferences) for t in TREES)
    assert last["num_tokens"] == 4 * sum(t.num_tokens for t in TREES)
    assert last["rewards/margins"] > 0 and last["learning_rate"] == 1e-2


def test_things_happen_when_the_plan_says_and_at_the_end(tmp_path):
    records, evaluated, saved, done = train(
        loaded(), tmp_path, WHOLE, steps=5, log_every=2, evaluate_every=2, checkpoint_every=3
    )
    assert done
    assert [record["step"] for record in records] == [2, 4, 5]
    assert (evaluated, saved) == ([2, 4, 5], [3, 5])


def test_a_run_that_is_asked_to_stop_saves_where_it_is(tmp_path):
    asked = iter([False, False, True])
    records, evaluated, saved, done = train(
        loaded(), tmp_path, WHOLE, steps=5, should_stop=lambda: next(asked)
    )
    assert not done
    assert (len(records), evaluated, saved) == (2, [], [2])


def test_what_an_evaluation_wants_kept_is_saved_off_the_plan(tmp_path):
    *_, saved, done = train(
        loaded(), tmp_path, WHOLE, steps=5, evaluate_every=2, checkpoint_every=3, to_keep=(2,)
    )
    assert done and saved == [2, 3, 5]


def test_a_stopped_run_keeps_what_was_summed_for_the_next_record(tmp_path):
    whole = train(loaded(), tmp_path, EACH, steps=4, log_every=4)[0]
    asked = iter([False, False, False, True])
    progress = Progress()
    stopped = train(
        loaded(), tmp_path, EACH, steps=4, log_every=4,
        should_stop=lambda: next(asked), progress=progress,
    )  # fmt: skip
    assert stopped[0] == [] and progress.step == 3
    window = Window.from_plain(json.loads(json.dumps(progress.window.to_plain())))
    assert window == progress.window
    again = Progress(3, progress.num_tokens, progress.seconds, window)
    resumed = train(loaded(), tmp_path, EACH, steps=4, log_every=4, progress=again)[0]
    for key in ("step", "num_pairs", "num_tokens", "tokens/chosen"):
        assert resumed[0][key] == whole[0][key], key
    assert resumed[0]["seconds"] > progress.seconds


def fitting(objective, capacity):
    """`objective` on a device that has room for so many tokens."""

    def limited(lm, forest):
        step = objective.step(lm, forest)
        if forest.num_tokens > capacity:
            raise torch.OutOfMemoryError("out of room")
        return step

    return replace(objective, step=limited)


def packed(capacity):
    return [collate(group) for group in bins(TREES, capacity)]


def plain_fit(lm, objective, forests, on_out_of_memory=lambda progress, forest: False):
    records = []
    optimizer = make_optimizer(
        lm.model, learning_rate=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-3
    )
    hooks = Hooks(
        records.append, lambda progress: False, lambda progress: None,
        on_out_of_memory=on_out_of_memory,
    )  # fmt: skip
    plan = Plan(3, 3, 1e-2, 0.0, "constant", 1.0)
    fit(lm, optimizer, objective, forests, plan, hooks, Progress())
    return records


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_step_that_runs_out_of_memory_is_taken_again_in_smaller_bins(tmp_path, error):
    # As torch's CPU allocator words it.
    sentence = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    wanted, got = loaded(), loaded()
    known = plain_fit(wanted, objective_of(wanted, tmp_path), lambda step: packed(15))
    capacity, tried = [60], []
    objective = objective_of(got, tmp_path)

    def limited(lm, forest):
        step = objective.step(lm, forest)
        # The second step fails in its second bin, with gradients and metrics of the first there.
        tried.append(forest.num_tokens)
        if capacity[0] == 15 or len(tried) < 2:
            return step
        raise error(sentence)

    def make_room(progress, forest):
        assert progress.step == 0 and forest.trees == packed(60)[1].trees
        capacity[0] = 15
        return True

    records = plain_fit(
        got, replace(objective, step=limited), lambda step: packed(capacity[0]), make_room
    )
    for one, other in zip(known, records, strict=True):
        for key in one.keys() - {"seconds", "tokens_per_second"}:
            assert one[key] == other[key], key
    for p, q in zip(wanted.model.parameters(), got.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_rehearsal_finds_what_does_not_fit_and_leaves_everything_as_it_was(tmp_path):
    lm = add_lora(loaded(), rank=2, alpha=4.0, dropout=0.5, targets="all-linear", seed=0)
    optimizer = make_optimizer(
        lm.model, learning_rate=1.0, weight_decay=0.1, beta1=0.9, beta2=0.999, epsilon=1e-3
    )
    objective = objective_of(lm, tmp_path)
    before, dice = fingerprint(lm), torch.get_rng_state()
    assert rehearse(lm, optimizer, objective, collate(TREES)) is None
    failed = rehearse(lm, optimizer, fitting(objective, 5), collate(TREES))
    assert isinstance(failed.error, torch.OutOfMemoryError)
    assert failed.error.__traceback__ is None and failed.forest.trees == tuple(TREES)
    assert fingerprint(lm) == before and torch.equal(torch.get_rng_state(), dice)
    assert not optimizer.state and all(p.grad is None for p in lm.model.parameters())


def test_a_step_that_cannot_be_smaller_is_an_error_that_says_what_to_do(tmp_path):
    lm = loaded()
    objective = fitting(objective_of(lm, tmp_path), 5)
    with pytest.raises(
        ModelError, match=r"ran out of memory with \d+ tokens.*out of room.*lora=true"
    ):
        plain_fit(lm, objective, lambda step: packed(15))
    assert all(p.grad is None for p in lm.model.parameters())


def test_the_first_step_leaves_room_for_the_state_that_it_makes(tmp_path, monkeypatch):
    lm, made, there = loaded(), [], []
    objective, make = objective_of(lm, tmp_path), loop.room_for_moments

    def room_for_moments(optimizer):
        room = make(optimizer)
        made.extend(map(weakref.ref, room))
        return room

    def step(lm, forest):
        there.append(sum(room.nbytes for ref in made if (room := ref()) is not None))
        return objective.step(lm, forest)

    monkeypatch.setattr(loop, "room_for_moments", room_for_moments)
    plain_fit(lm, replace(objective, step=step), lambda step: packed(60))
    moments, num_bins = 8 * sum(p.numel() for p in lm.model.parameters()), len(packed(60))
    assert there == [moments] * num_bins + [0] * 2 * num_bins


def test_the_graph_of_one_bin_is_gone_when_the_next_is_read(tmp_path):
    lm, graphs = loaded(), []
    objective = objective_of(lm, tmp_path)

    def step(lm, forest):
        assert not [graph for graph in graphs if graph() is not None]
        made = objective.step(lm, forest)
        graphs.append(weakref.ref(made.loss_sum))
        return made

    plain_fit(lm, replace(objective, step=step), lambda step: packed(20))
    assert len(graphs) > 3


def test_moments_that_do_not_fit_are_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def full(optimizer, closure=None):
        raise torch.OutOfMemoryError("no room\nfor this")

    lm = loaded()
    objective = objective_of(lm, tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(ModelError, match=r"two moments .* \(no room\).* optimizer.moments=8bit"):
        plain_fit(lm, objective, lambda step: packed(60))


def test_another_error_in_a_step_is_not_taken_for_a_lack_of_memory(tmp_path):
    lm = loaded()

    def broken(lm, forest):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        objective = replace(objective_of(lm, tmp_path), step=broken)
        plain_fit(lm, objective, lambda step: packed(15), lambda progress, forest: True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_and_the_weights_stay(tmp_path, bad):
    lm = loaded()
    before = fingerprint(lm)
    with pytest.raises(Refusal, match=r"step 1: the loss is .* Its rows: rows\.jsonl:1") as refused:
        train(lm, tmp_path, RAGGED, loss=lambda logps: dpo(logps) * bad)
    assert refused.value.code == "UW303"
    assert "and 2 more" in str(refused.value)
    assert fingerprint(lm) == before


def test_a_gradient_that_is_not_finite_is_refused_too(tmp_path):
    def steep(logps):
        # The square root of zero is finite; its slope is not.
        return (logps.margin * 0).sqrt()

    lm = loaded()
    before = fingerprint(lm)
    with pytest.raises(Refusal, match="the loss is 0.* the gradient's norm nan"):
        train(lm, tmp_path, WHOLE, loss=steep)
    assert fingerprint(lm) == before


def test_a_refused_step_names_the_rows_that_it_is_refused_for(tmp_path):
    def spoiled(logps):
        seven = torch.maximum(logps.tokens_chosen, logps.tokens_rejected) == 7
        return torch.where(seven, torch.nan, dpo(logps))

    culprits = [str(TREES[i].ids[0].row) for i in (2, 7)]
    said = f"The rows whose loss it is: {', '.join(culprits)}."
    for name, cut in (("whole", WHOLE), ("ragged", RAGGED)):
        with pytest.raises(Refusal) as refused:
            train(loaded(), tmp_path / name, cut, loss=spoiled)
        assert said in str(refused.value)
