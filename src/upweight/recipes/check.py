"""check(): what train would find out before step 1, and nothing written; and whether a model is
still the one that was exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upweight.config import Resolved, Run
from upweight.data.account import Account
from upweight.data.trees import Shown, show
from upweight.errors import DataError, ModelError
from upweight.evidence.track import clients
from upweight.models.place import placed
from upweight.models.probes import FILE, read_probes
from upweight.models.scalar import is_reward_model
from upweight.models.weights import WHERE_REWARDS_GO
from upweight.recipes.exported import Compared, probes_beside, require_as_exported
from upweight.recipes.prepare import (
    Prepared,
    account_lines,
    account_record,
    describe,
    figure_lines,
    load_policy,
)
from upweight.recipes.reference import has_a_say, probe_reference
from upweight.recipes.rewarding import ask_rewards, require_rewards
from upweight.recipes.screen import AtEnd, Screen, Silent, counted
from upweight.recipes.start import start, with_answers, with_reference
from upweight.training import checkpoint
from upweight.training.loop import Plan
from upweight.training.memory import MemoryPlan
from upweight.training.rundir import HoldsRun, require_run_dir
from upweight.trust.finding import Finding
from upweight.trust.preflight import Figures
from upweight.types import Tree


@dataclass(frozen=True)
class Checked:
    """What is known before step 1, of a run or of the first of several stages; `later` are the
    others. `warned` are the lines of what may be wrong, and `elsewhere` says that train would need
    another out. Prints as what the terminal says of it."""

    prepared: Prepared
    model: Mapping[str, str]
    plan: Plan
    memory: MemoryPlan
    shown: tuple[Shown, ...]
    warned: tuple[str, ...] = ()
    elsewhere: bool = False
    later: tuple[Checked, ...] = ()

    @property
    def trees(self) -> Mapping[str, list[Tree]]:
        return self.prepared.trees

    @property
    def accounts(self) -> Mapping[str, Account]:
        return self.prepared.accounts

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.prepared.findings

    @property
    def figures(self) -> Mapping[str, Figures]:
        return self.prepared.figures

    def __repr__(self) -> str:
        lines = account_lines(self.prepared) + figure_lines(self.figures)
        lines += [*map(str, self.shown), *self.warned, self.verdict, *map(repr, self.later)]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """The last line."""
        where = " with another out, since this one holds a run" if self.elsewhere else ""
        num = len(self.warned) - len(self.prepared.unwatched)
        codes = ", ".join(sorted({finding.code for finding in self.findings}))
        said = counted(num, "warning") if num else "no warnings"
        said += f" ({codes})" if codes else ""
        said += f", {num} not watched" if (num := len(self.prepared.unwatched)) else ""
        return f"ready to train{where}: nothing refused, {said}"

    def to_json(self) -> dict[str, Any]:
        """What figures.FIELDS describes."""
        record: dict[str, Any] = {
            **account_record(self.prepared),
            "model": self.model,
            "plan": asdict(self.plan),
            "memory": {**asdict(self.memory), "needed": self.memory.needed},
            "rows": [asdict(shown) for shown in self.shown],
            "verdict": self.verdict,
        }
        later = [stage.to_json() for stage in self.later]
        return {**record, "later_stages": later} if later else record


def check(
    resolved: Resolved, screen: Screen | None = None, num_shown: int = 3, *, ask: bool = True
) -> Checked:
    """Everything that can be known before step 1: trackers, out, model, rows, adapter, room on the
    disk, and, where it is to `ask`, what rewards and reference say of a few rows.

    Raises what training would raise for it.
    """
    screen = screen or Silent()
    with AtEnd(screen) as held:
        checked = _checked(resolved, held, num_shown, ask)
    screen.note(checked.verdict)
    return checked


def _checked(resolved: Resolved, screen: AtEnd, num_shown: int, ask: bool) -> Checked:
    run, saved, elsewhere = resolved.run, None, False
    clients(run.track)
    if run.out is not None:
        out = Path(run.out)
        try:
            require_run_dir(out, run.resume)
        except HoldsRun:
            # Nothing is written there, and what is asked about may be the run that it holds.
            elsewhere = True
        newest = checkpoint.latest(out / "checkpoints") if run.resume else None
        saved = checkpoint.load(newest, verified=True).position if newest is not None else None
    if ask:  # What a stage before this one makes is not there yet.
        require_rewards(run)
    begun = start(resolved, screen, saved)
    if ask and saved is None:
        ask_rewards(begun.run, begun.prepared, screen)
    if ask and has_a_say(begun.run, begun.prepared):
        screen.stage("reference")
        probed = probe_reference(begun.run, begun.lm, begun.prepared)
        begun = with_reference(
            begun, probed.logps, probed.own, screen, fresh=True, probes=probed.probes
        )
        begun = with_answers(begun, probed.answers, screen)
    for line in figure_lines(begun.prepared.figures):
        screen.note(line)
    screen.note(plan_line(begun.plan))
    shown = tuple(show(t, begun.lm.tokenizer) for t in begun.prepared.trees["train"][:num_shown])
    for row in shown:
        screen.row(row)
    lm = begun.lm
    model = {"name": lm.name, "description": describe(lm)}
    warned = tuple(screen.warned)
    return Checked(begun.prepared, model, begun.plan, begun.memory, shown, warned, elsewhere)


def plan_line(plan: Plan) -> str:
    """What a run would do, and how often it would look and save."""
    every = (("evaluated", plan.evaluate_every), ("saved", plan.checkpoint_every))
    when = "".join(f", {what} every {num:,}" for what, num in every if num is not None)
    return (
        f"plan: {plan.total_steps:,} steps ({plan.steps_per_epoch:,} an epoch), learning rate "
        f"{plan.learning_rate:g}, {plan.schedule}{when}"
    )


def check_model(run: Run, screen: Screen | None = None) -> Compared:
    """`run.model` against the probes that travelled with it.

    Raises ModelError where there are none, Refusal UW402 where its tokenizer and template write
    other tokens, UW401 where it gives other log-probs.
    """
    screen = screen or Silent()
    placed(run.model)
    if is_reward_model(Path(run.model).expanduser()):
        raise ModelError(
            f"{run.model} is a reward model: it gives no log-probs to compare. "
            f"{WHERE_REWARDS_GO}: upweight score --model {run.model} --data FILE "
            "--out FILE shows how it ranks preferences."
        )
    file = probes_beside(run.model)
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist: without data, check compares a model with the {FILE} that it "
            "was exported with. Copy it from the run's model folder, or name data to check a run."
        )
    probes = read_probes(file)
    if not probes.probes:
        raise DataError(
            f"{file} holds no probe, so there is nothing to compare: the model's chat template "
            "took none of the conversations when it was exported. Name data to check a run."
        )
    screen.stage("model")
    lm = load_policy(run)
    found = require_as_exported(run.model, lm, probes)
    day = "" if probes.date is None else f" (as of {probes.date})"
    screen.note(
        f"{run.model}: {found.num_probes} probes have the same tokens{day}, and log-probs that "
        f"differ by {found.worst:.2g} nats a token at most (rounding of its weights: "
        f"{found.allowed})"
    )
    if found.doubt is not None:
        screen.note(f"warning: {found.doubt}.")
    return found
