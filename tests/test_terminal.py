import io
import json
import math
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from rich.text import Text

from upweight.data.trees import Shown, ShownResponse
from upweight.demo.run import Outcome, final_accuracy
from upweight.recipes.kinds import KINDS
from upweight.recipes.train import Result
from upweight.terminal import Terminal, show_outcome

TRAIN = {"kind": "train", "loss": 0.69, "rewards/margins": 0.1, "rewards/accuracies": 0.5}
EVAL = {"kind": "eval", "set": "heldout", "loss": 0.69, "rewards/margins": 0.1}
EVAL |= {"rewards/accuracies": 0.5, "rewards/accuracies_low": 0.4, "rewards/accuracies_high": 0.6}


def lines(*records: dict[str, object], total: int = 2) -> list[str]:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=200), None)
    terminal.stage("training")
    for record in records:
        terminal.record(record, total)
    return out.getvalue().splitlines()


def test_the_time_that_is_left_is_told_from_the_second_record_on():
    steps = [{**TRAIN, "step": step, "tokens_per_second": 1234.5} for step in (1, 2)]
    first, second = lines(*steps)
    assert first == "step 1/2  loss 0.690  margin +0.100  accuracy 50%  1.2k tok/s"
    assert second.startswith("step 2/2") and second.endswith("0:00 left")


def test_an_evaluation_is_a_line_of_its_own_with_its_interval_and_kl():
    (plain,) = lines({**EVAL, "step": 3})
    assert plain == "heldout, step 3: loss 0.690, accuracy 50.0% [40.0, 60.0]"
    (sampled,) = lines({**EVAL, "step": 3, "kl": 1.5, "length": 20.0})
    assert sampled == plain + ", KL 1.50, length 20"


def test_an_accuracy_below_chance_is_not_rounded_to_chance():
    near = {"rewards/accuracies": 0.471, "rewards/accuracies_low": 0.445}
    (said,) = lines({**EVAL, "step": 3, **near, "rewards/accuracies_high": 0.497})
    assert said == "heldout, step 3: loss 0.690, accuracy 47.1% [44.5, 49.7]"
    alone = dict.fromkeys(("rewards/accuracies_low", "rewards/accuracies_high"), math.nan)
    (said,) = lines({**EVAL, "step": 3, **alone})
    assert said == "heldout, step 3: loss 0.690, accuracy 50.0%"


def test_the_demos_table_has_the_last_accuracy_as_its_line_has_it(tmp_path: Path):
    last = {**EVAL, "step": 3, "rewards/accuracies": 0.4715}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    (said,) = lines(last)
    assert said.endswith(f"accuracy {final_accuracy(tmp_path)}")


PAIRS = {"rewards/margins": -12.345, "rewards/accuracies": 0.625}
ROUND = {"reward": -0.13, "kl": 11.87, "length": 121.0}
STEPS = {
    "sft": {"loss": 1.9642},
    "reward": {"loss": 0.6931, **PAIRS},
    "dpo": {"loss": 0.6931, **PAIRS},
    "online_dpo": {"loss": 0.6931, **PAIRS, **ROUND},
    "ppo": {"loss": 1.9642, **ROUND},
    "grpo": {"loss": 1.9642, **ROUND},
    "rloo": {"loss": 1.9642, **ROUND},
}


@pytest.mark.parametrize("objective", KINDS)
def test_a_step_of_every_objective_fits_eighty_columns(
    objective: str, monkeypatch: pytest.MonkeyPatch
):
    step = {"kind": "train", "tokens_per_second": 12345.6, **STEPS[objective]}
    now = iter([0.0, 1000.0, 1950.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=200), None)
    for at in (1000, 1100):
        terminal.record({**step, "step": at}, 9999)
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 1000/9999  loss ")
    # 8899 steps of 9.5 seconds.
    assert second.endswith("23.5 h left") and len(second) <= 80, second


def test_what_is_sampled_at_an_evaluation_fits_eighty_columns():
    for kl, shown in ((2.071, "2.07"), (18.31, "18.3")):
        (said,) = lines({**EVAL, "step": 2000, "kl": kl, "length": 121.3})
        assert said.endswith(f"accuracy 50.0% [40.0, 60.0], KL {shown}, length 121")
        assert len(said) <= 80
    ends = {"reward_low": 0.056, "reward_high": 0.308, "kl_low": 1.5, "kl_high": 2.6}
    found = {"kl": 2.07, "length": 15.3, "reward": 0.186, "reference_reward": 0.19, **ends}
    (said,) = lines({"kind": "eval", "set": "prompts", "step": 2000, **found})
    assert said == (
        "prompts, step 2000: reward 0.186 [0.056, 0.308] (ref. 0.190), KL 2.07, length 15"
    )
    assert len(said) <= 80


def test_a_kl_whose_interval_lies_below_zero_is_said_to_be_unknown():
    below = {"kl": -0.5, "kl_low": -0.8, "kl_high": -0.2}
    line, *rest = lines({**EVAL, "step": 3, **below})
    assert line.endswith("KL -0.50")
    assert "interval [-0.80, -0.20] lies below 0, where no KL is" in " ".join(rest)
    assert len(lines({**EVAL, "step": 3, **below, "kl_high": 0.1})) == 1


def test_a_note_that_is_longer_than_the_terminal_breaks_between_words():
    note = "weights 532 MiB and gradients 19 MiB and activations 3.6 GiB for 2,048 tokens. " * 3
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    Terminal(console, Live(console=console)).note(note)
    said = [line.rstrip() for line in Text.from_ansi(out.getvalue()).plain.splitlines()]
    assert len(said) > 2 and max(map(len, said)) <= 80
    assert " ".join(said).split() == note.split()


def test_an_evaluation_says_no_more_than_it_knows():
    assert lines({"kind": "eval", "set": "heldout", "step": 3}) == []
    one = {"reward": 0.5, "reward_low": math.nan, "reward_high": math.nan, "reference_reward": 0.25}
    (said,) = lines({"kind": "eval", "set": "heldout", "step": 3, **one})
    assert said == "heldout, step 3: reward 0.500 (ref. 0.250)"


def test_the_time_that_is_left_is_that_of_the_run_and_not_of_one_before_it():
    out = io.StringIO()
    screen = Terminal(Console(file=out, width=200), None)
    step = {**TRAIN, "tokens_per_second": 1.0}
    screen.record({**step, "step": 1}, 2)
    assert screen.first_record is not None
    screen.stage("training")
    assert screen.first_record is None


SHOWN = Shown(
    "f:1",
    "Why?\x1b[2J",
    3,
    (
        ShownResponse("chosen", "word " * 300, "<end>", 301),
        ShownResponse("rejected", "No.", None, 2),
    ),
)


@pytest.mark.parametrize("width", [80, 120])
def test_a_row_in_a_terminal_fits_and_says_in_colour_what_is_scored(width: int):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system="standard")
    Terminal(console, Live(console=console)).row(SHOWN)
    said = Text.from_ansi(out.getvalue())
    assert max(map(len, said.plain.splitlines())) <= width
    flat = " ".join(said.plain.split())
    assert "|No.|cut, no stop 2 tokens" in flat and "word |<end> 301 tokens" in flat
    assert "... 1,100 characters ..." in flat
    assert "\x1b[2J" not in out.getvalue() and "Why?\\x1b[2J" in flat
    red = "\x1b[31m"
    assert f"{red}No." in out.getvalue()


def test_a_row_in_a_pipe_has_a_line_for_each_text_and_marks_without_colour():
    out = io.StringIO()
    Terminal(Console(file=out, width=80), None).row(SHOWN)
    assert out.getvalue().splitlines() == [
        "f:1",
        'prompt   "Why?\\u001b[2J"',
        f'chosen   | "{"word " * 300}" | "<end>"',
        'rejected | "No." | cut, no stop',
    ]


def test_the_demos_table_fits_eighty_columns(capsys: pytest.CaptureFixture[str]):
    result = Result(Path("run"), Path("run/model"), Path("run/report.html"), True, 2)
    rows = [("mean VADER sentiment", "0.268 [0.192, 0.347]", "0.595 [0.523, 0.658]", "+0.327")]
    show_outcome(Outcome(result, rows, [("How is it?", "Bad.", "Good.")]))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for text in ("0.268 [0.192, 0.347]", "+0.327", "reference  Bad.", "run/report.html"):
        assert text in said
