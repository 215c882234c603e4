"""The sampler's log-probs beside the trainer's: rounding is let through, another policy is not."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

import upweight.recipes.online as online
import upweight.training.rollout as rollout
from runs import furnish, write_rows
from upweight.cli import main
from upweight.errors import Refusal
from upweight.models.sample import sample
from upweight.recipes.drawing import require_same_policy
from upweight.training.agreement import FEWEST, held_against
from upweight.types import ResponseId, RowId

BF16 = 0.1
SIZE, ANSWER, LEVEL, TILT = range(4)


def drawn(num=128, length=48, rounding=0.05, seed=0, heat=1.0):
    """(the trainer's log-probs, the sampler's) of answers as a language model's are: a token's
    log-prob is spread by some 3 nats, and rounding has a few outliers."""
    draw = torch.Generator().manual_seed(seed)
    ids = [ResponseId(RowId("rows.jsonl", i // 4 + 1), i % 4) for i in range(num)]
    logps = -3 * torch.empty(num, length, dtype=torch.float64).exponential_(generator=draw)
    noise = rounding * torch.randn(num, length, dtype=torch.float64, generator=draw)
    noise *= 1 + 2 * (torch.rand(num, length, generator=draw) < 0.02)
    # At a temperature a token loses in proportion to its log-prob, and all gain alike.
    tilted = logps / heat - (logps / heat - logps).mean()
    return dict(zip(ids, logps, strict=True)), dict(zip(ids, tilted + noise, strict=True))


def beyond(found, said):
    plain = {i: tuple(x.tolist()) for i, x in said.items()}
    return [n for n, b in enumerate(held_against(found, plain, BF16)) if not b.agrees]


@pytest.mark.parametrize(("num", "length"), [(128, 48), (16, 8), (64, 1), (2, 1), (1, 64), (3, 11)])
def test_rounding_raises_no_alarm(num: int, length: int):
    for seed in range(40):
        assert beyond(*drawn(num, length, seed=seed)) == []


def test_errors_that_the_tokens_of_an_answer_share_raise_none():
    for seed in range(40):
        found, said = drawn(rounding=0.03, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        shared = {i: x + 0.015 * torch.randn(1, generator=draw) for i, x in said.items()}
        assert beyond(found, shared) == []


@pytest.mark.parametrize("heat", [0.97, 1.03, 1.04])
def test_another_temperature_is_seen_below_the_rounding_of_a_token(heat: float):
    found, said = drawn(heat=heat)
    mean = torch.cat([found[i] - said[i] for i in found]).abs().mean()
    assert mean < BF16 and TILT in beyond(found, said)
    worst = max(held_against(found, as_said(said), BF16), key=lambda beside: beside.beyond)
    assert f"as at a temperature of {heat:.2f}" in worst.said


def as_said(said):
    return {i: tuple(x.tolist()) for i, x in said.items()}


def test_answers_to_other_rows_are_seen_though_they_are_few():
    found, said = drawn()
    some = list(said)[::10]
    mixed = dict(said) | {i: said[i] + 0.35 for i in some}
    mean = torch.cat([found[i] - mixed[i] for i in found]).abs().mean()
    assert mean < BF16
    assert ANSWER in beyond(found, mixed)
    worst = held_against(found, as_said(mixed), BF16)[ANSWER]
    assert any(f"{i.index} to {i.row} " in worst.said for i in some)


@pytest.mark.parametrize("kept", [0.95, 1.05])
def test_a_sampler_that_leaves_tokens_out_is_seen_by_the_level(kept: float):
    found, said = drawn()
    other = {i: x - math.log(kept) for i, x in said.items()}
    assert beyond(found, other) == [LEVEL]
    word = "above" if kept < 1 else "below"
    assert f"nats a token {word}" in held_against(found, as_said(other), BF16)[LEVEL].said


def test_a_stop_token_that_is_drawn_otherwise_is_not_lost_in_a_long_answers_mean():
    ids = [ResponseId(RowId("rows.jsonl", 1), k) for k in range(3)]
    found = {i: torch.full((50,), -1.0) for i in ids}

    def size(*said: float) -> float:
        return held_against(found, {i: said for i in ids}, BF16)[SIZE].found

    assert size(*(-1.0,) * 49, -3.0) == pytest.approx(2.0)
    assert size(*(-1.5,) * 50) == pytest.approx(0.5)
    assert size(-3.0, *(-1.0,) * 49) == pytest.approx(0.04)


@pytest.mark.parametrize("num", [FEWEST - 1, FEWEST])
@pytest.mark.parametrize("gap", [0.2, -0.2, math.nan, math.inf])
def test_a_gap_that_rounding_does_not_explain_is_refused(num: int, gap: float):
    name = ResponseId(RowId("rows.jsonl", 1), 0)
    found = {name: torch.linspace(-5.0, -1.0, num, dtype=torch.float64)}
    require_same_policy(held_against(found, {name: tuple(found[name].tolist())}, BF16))
    other = tuple((found[name] + gap).tolist())
    with pytest.raises(Refusal, match="the sampler is not the policy"):
        require_same_policy(held_against(found, {name: other}, BF16))


# Through a run


def rounds(out: str, *more: str) -> int:
    words = (
        "train --model model --data prompts.jsonl --objective grpo --dtype bfloat16 --steps 1 "
        "--reward count.py:score --prompts_per_round 16 --responses 8 --max_tokens 24 --out"
    )
    return main([*words.split(), out, *more])


@pytest.fixture
def _prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    Path("count.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    write_rows("prompts.jsonl", [{"prompt": f"question {i}"} for i in range(16)])


@pytest.mark.usefixtures("_prompts")
@pytest.mark.parametrize("sharing", ["true", "false"])
def test_a_sampler_that_is_warmer_than_the_policy_ends_a_run_in_bf16(
    sharing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # Without sharing transformers reads the prompts, as it does for families of other layers.
    assert rounds("right", "--sharing", sharing) == 0
    monkeypatch.setattr(rollout, "sample", partial(sample, temperature=1.05))
    capsys.readouterr()
    assert rounds("warm", "--sharing", sharing) == 2
    printed = capsys.readouterr().err
    assert "UW101" in printed and "as at a temperature of 1.0" in printed


@pytest.mark.usefixtures("_prompts")
def test_a_sampler_whose_log_probs_are_not_the_policys_ends_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    draw = online.draw_answers

    def other(*given):
        trees, said = draw(*given)
        return trees, {i: tuple(y + 0.1 for y in x) for i, x in said.items()}

    monkeypatch.setattr(online, "draw_answers", other)
    assert rounds("wrong", "--dtype", "float32") == 2
    assert "UW101" in (printed := capsys.readouterr().err)
    assert "the sampler is not the policy" in printed and "0.1 nats a token" in printed
