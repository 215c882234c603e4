"""What a run looks like in a terminal: stages, a live line, notes that stay."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from upweight.data.trees import Shown
    from upweight.demo.run import Outcome


class Terminal:
    """A live line on a terminal, plain lines elsewhere (a log file, a pipe)."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self.console, self.live = console, live
        self.name, self.began, self.last_plain = "", time.monotonic(), 0.0
        self.first_record: tuple[int, float] | None = None

    def stage(self, name: str) -> None:
        self.name, self.began, self.first_record = name, time.monotonic(), None
        self._show(Text(f"{name} ...", style="bold"))

    def progress(self, done: int, total: int) -> None:
        if total:
            text = f"{self.name} {100 * done / total:3.0f} %"
            if done:
                text += ", " + _left((time.monotonic() - self.began) * (total - done) / done)
            self._show(Text(text, style="bold"))

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=self.live is None)

    def table(self, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for i, heading in enumerate(head):
            # Where the terminal is narrow all fold, and none goes.
            side = "right" if i else "left"
            table.add_column(Text(heading), justify=side, min_width=4, overflow="fold")
        for line in lines:
            table.add_row(*map(Text, line))
        self.console.print(table)

    def warn(self, text: str) -> None:
        self.note(text)

    def row(self, shown: Shown) -> None:
        if self.live is None:
            self.console.print(Text(str(shown)), soft_wrap=True)
        else:
            self.console.print(_row(shown))

    def record(self, record: Mapping[str, object], total_steps: int) -> None:
        if record.get("kind") == "eval":
            if line := _evaluation_line(record):
                self.note(line)
            return
        step = record["step"]
        assert isinstance(step, int)
        phrases = ROUND if "reward" in record else STEP
        row = [
            f"step {step}/{total_steps}",
            *(phrase.format(record[key]) for key, phrase in phrases.items() if key in record),
        ]
        speed = record["tokens_per_second"]
        if phrases is STEP and isinstance(speed, int | float):
            row.append(_speed(speed))
        # What came before the first record (an evaluation, a slow first step) says nothing of the
        # steps to come, and a resumed run does not begin at step 0.
        now = time.monotonic()
        first, then = self.first_record = self.first_record or (step, now)
        if step > first:
            row.append(_left((now - then) / (step - first) * (total_steps - step)))
        line = "  ".join(row)
        if self.live is not None and step < total_steps:
            self.live.update(Text(line))
        elif step == total_steps or now - self.last_plain > 5:
            self.last_plain = now
            self.note(line)

    def _show(self, text: Text) -> None:
        if self.live is not None:
            self.live.update(text)


SHOWN_CHARACTERS = 400
"""Of a text in a terminal; its beginning and end say what is scored."""

SIDES = {"chosen": "green", "rejected": "red", "response": "blue"}


def _row(shown: Shown) -> Table:
    """The prompt dimmed, what is scored in its side's colour, the stop token set off from it.

    The marks are there without the colours too: a bar before and behind what is scored.
    """
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", Text(shown.row, style="bold"))
    table.add_row("prompt", _elided(shown.prompt, "dim"))
    for response in shown.responses:
        side = SIDES[response.role]
        text = Text("|").append_text(_elided(response.scored, side)).append("|")
        if response.stop is None:
            text.append("cut, no stop", style="reverse yellow")
        else:
            text.append(response.stop, style=f"reverse {side}")
        text.append(f" {response.tokens} tokens", style="dim")
        table.add_row(Text(response.role, style=side), text)
    return table


def _elided(text: str, style: str) -> Text:
    """The text with its middle left out where it is long; control characters, which could draw
    over the rest, as their names."""
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    if len(text) <= SHOWN_CHARACTERS:
        return Text(text, style=style)
    half = SHOWN_CHARACTERS // 2
    shown = Text().append(text[:half], style=style)
    shown.append(f" ... {len(text) - 2 * half:,} characters ... ", style="italic")
    return shown.append(text[-half:], style=style)


def _left(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h left"
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"


def _speed(tokens_per_second: float) -> str:
    thousands = tokens_per_second / 1000
    if thousands < 1:
        return f"{tokens_per_second:.0f} tok/s"
    return f"{thousands:.{0 if thousands >= 10 else 1}f}k tok/s"


STEP = {
    "loss": "loss {:.3f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "accuracy {:.0%}",
}
"""What a training step's line says of these metrics, where it has them, and its speed. With as many
as 9999 steps it fits 80 columns."""

ROUND = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "kl": "KL {:.2f}",
    "length": "length {:.0f}",
}
"""That of a step on the policy's own answers, whose tokens a second go up and down with how many
steps a round makes."""

EVALUATION = {
    "loss": "loss {loss:.3f}",
    "rewards/accuracies": "accuracy {rewards/accuracies:.1%} "
    "[{rewards/accuracies_low:.1%}, {rewards/accuracies_high:.1%}]",
    "reward": "reward {reward:.3f} [{reward_low:.3f}, {reward_high:.3f}] "
    "(ref. {reference_reward:.3f})",
    "kl": "KL {kl:.{digits}f}",
    "length": "length {length:.0f}",
}
"""What an evaluation's line says of these metrics, where it has them. An accuracy has the decimal
that tells it from chance. Of preferences and answers, or of answers and rewards, it fits 80
columns."""


def _evaluation_line(record: Mapping[str, object]) -> str:
    kl = record.get("kl")
    digits = 1 if isinstance(kl, float) and kl >= 10 else 2
    # The unit stands once; of a few prompts there is no interval.
    parts = [
        re.sub(r"%(?=[,\]])", "", phrase.format(**record, digits=digits)).replace(" [nan, nan]", "")
        for key, phrase in EVALUATION.items()
        if key in record
    ]
    if not parts:
        # A set of prompts is measured by what is sampled, and another set may be asked for that.
        return ""
    line = f"{record['set']}, step {record['step']}: {', '.join(parts)}"
    high = record.get("kl_high")
    if isinstance(high, float) and high < 0:
        line += (
            f"\n  The KL's interval [{record['kl_low']:.2f}, {high:.2f}] lies below 0, where no KL "
            "is: the answers were drawn otherwise than the policy is read, or it is chance. Take "
            "the KL as not known."
        )
    return line


@contextmanager
def default_screen(stderr: bool = True) -> Generator[Terminal]:
    """The terminal, on standard error unless what is noted is the command's result."""
    console = Console(stderr=stderr, highlight=False)
    if not (sys.stderr if stderr else sys.stdout).isatty():
        yield Terminal(console, None)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield Terminal(console, live)


def show_outcome(outcome: Outcome) -> None:
    """The demo's table, three answers side by side, and where the report is."""
    console = Console(highlight=False)
    table = Table(title="held-out prompts", title_justify="left", show_lines=True)
    for heading in ("", "reference", "policy"):
        table.add_column(heading)
    for name, before, after, note in outcome.rows:
        what = Text(name)
        if note:
            what.append(f"\n{note}", style="dim")
        table.add_row(what, before, after)
    console.print(table)
    for prompt, before, after in outcome.answers:
        console.print(Text(f"\n{prompt}", style="bold"))
        console.print(Text(f"  reference  {before}"))
        console.print(Text(f"  policy     {after}"))
    console.print(Text(f"\nmodel:  {outcome.result.model}"), soft_wrap=True)
    console.print(Text(f"report: {outcome.result.report}"), soft_wrap=True)
