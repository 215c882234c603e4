from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from oracles import loaded, random_trees
from upweight.data.pack import collate
from upweight.errors import Refusal
from upweight.models.load import fingerprint
from upweight.training import guard
from upweight.training.loop import Hooks, Plan, Progress, fit
from upweight.training.objectives import Objective, sft
from upweight.training.optimizer import make_optimizer
from upweight.types import Step

TREES = random_trees([(4, 3 + n % 3) for n in range(12)], seed=3)


@pytest.fixture
def as_if_asking_waited(monkeypatch):
    monkeypatch.setattr(guard, "WAITING_DEVICES", {"cpu"})


def make(lm):
    return make_optimizer(
        lm.model, learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.999, epsilon=1e-8
    )


def trees_of(step):
    return TREES[2 * step : 2 * step + 2]


def run(lm, steps, *, optimizer=None, spoil=None, **options):
    """fit() with one tree a micro-batch; `spoil(made, forest)` changes a Step."""
    objective = sft()
    if spoil is not None:
        objective = replace(objective, step=lambda lm, f: spoil(sft().step(lm, f), f))
    seen = options.pop("seen", [])
    hooks = Hooks(
        lambda record: seen.append(("record", record["step"])),
        lambda progress: bool(seen.append(("evaluate", progress.step))),
        lambda progress: seen.append(("save", progress.step)),
        options.pop("should_stop", lambda: False),
    )
    plan = Plan(steps, steps, 1e-2, 0.0, "constant", 1.0, **options)

    def forests(step):
        return [collate([tree]) for tree in trees_of(step)]

    optimizer = optimizer or make(lm)
    fit(lm, optimizer, objective, forests, plan, hooks, Progress())
    assert "found_inf" not in vars(optimizer)
    return seen


def nan_in(step, what="loss"):
    """NaN in the second tree of a step: its loss, or only its gradient; or one counted twice."""
    row = trees_of(step)[1].ids[0].row

    def spoil(made, forest):
        if forest.trees[0].ids[0].row != row:
            return made
        if what == "count":
            return replace(made, count=2 * made.count)
        bad = made.loss_sum * torch.nan if what == "loss" else (made.loss_sum * 0).sqrt()
        return replace(made, loss_sum=bad)

    return spoil


@pytest.mark.parametrize("what", ["loss", "gradient", "count"])
@pytest.mark.usefixtures("as_if_asking_waited")
def test_from_a_refused_step_on_no_weight_moves_until_somebody_asks(what):
    wanted, got = loaded(), loaded()
    before = make(wanted)
    run(wanted, 2, optimizer=before)
    optimizer = make(got)
    with pytest.raises(Refusal) as refused:
        run(got, 6, optimizer=optimizer, spoil=nan_in(2, what), log_every=6)
    assert refused.value.found == {"step": 3}
    said = str(refused.value)
    assert said.startswith("step 3: ")
    if what == "count":
        assert refused.value.code == "UW302" and "2 micro-batches" in said
    else:
        assert refused.value.code == "UW303"
        rows = [str(tree.ids[0].row) for tree in trees_of(2)][what == "loss" :]
        assert f": {', '.join(rows)}." in said
        assert ("the loss is nan" in said) == (what == "loss")
    assert fingerprint(got) == fingerprint(wanted)
    # The moments and how often they were updated, too.
    states = zip(
        before.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    )
    for one, other in states:
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("as_if_asking_waited")
@pytest.mark.parametrize(
    "options",
    [
        dict(log_every=4),
        dict(log_every=6, evaluate_every=4),
        dict(log_every=6, checkpoint_every=4),
    ],
)
def test_nothing_is_shown_or_kept_of_a_refused_step(options):
    seen = []
    with pytest.raises(Refusal, match="step 2: "):
        run(loaded(), 6, spoil=nan_in(1), seen=seen, **options)
    assert seen == []


@pytest.mark.usefixtures("as_if_asking_waited")
def test_a_run_that_stops_asks_before_it_saves():
    asked = iter([False, False, False, True])
    with pytest.raises(Refusal, match="step 2: "):
        run(loaded(), 6, spoil=nan_in(1), log_every=6, should_stop=lambda: next(asked))


@pytest.mark.usefixtures("as_if_asking_waited")
def test_steps_that_are_right_are_what_they_are_where_each_is_asked_about(monkeypatch):
    got, wanted = loaded(), loaded()
    seen = run(got, 6, log_every=3)
    assert seen == [("record", 3), ("record", 6), ("evaluate", 6), ("save", 6)]
    monkeypatch.setattr(guard, "WAITING_DEVICES", set())
    run(wanted, 6, log_every=3)
    assert fingerprint(got) == fingerprint(wanted)


ASKING = {
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__),
    *(torch.Tensor.__int__, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero),
}


class Asked(TorchFunctionMode):
    """How often a number is asked of a tensor."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.times += func in ASKING
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("as_if_asking_waited")
def test_between_the_steps_that_are_shown_no_number_is_asked_for():
    # What an objective and a forest ask for is not the loop's.
    lm, asked, times = loaded(), Asked(), []
    weight = lm.causal.get_output_embeddings().weight

    def step(lm, forest):
        times.append(asked.times)
        once = torch.ones(())
        return Step(weight.sum() * 1e-3, once, {"x": (once, once)})

    objective = Objective("scored", lambda forest: 1.0, step)
    hooks = Hooks(lambda record: None, lambda progress: False, lambda progress: None)
    plan = Plan(6, 6, 1e-2, 0.0, "constant", 1.0, log_every=3)
    forests = [collate(TREES[:1])]
    with asked:
        fit(lm, make(lm), objective, lambda step: forests, plan, hooks, Progress())
    by_step = [b - a for a, b in zip(times, [*times[1:], asked.times], strict=True)]
    assert by_step[0] == by_step[1] == by_step[3] == by_step[4] == 0
    assert by_step[2] > 0 and by_step[5] > 0


def test_an_optimizer_without_a_fused_kernel_is_asked_about_at_every_step(monkeypatch):
    monkeypatch.setattr(guard, "WAITING_DEVICES", {"cpu"})
    lm, wanted = loaded(), loaded()
    plain = torch.optim.SGD(lm.model.parameters(), lr=1e-2)
    with pytest.raises(Refusal, match="step 2: "):
        run(lm, 6, optimizer=plain, spoil=nan_in(1), log_every=6)
    run(wanted, 1, optimizer=torch.optim.SGD(wanted.model.parameters(), lr=1e-2))
    assert fingerprint(lm) == fingerprint(wanted)
