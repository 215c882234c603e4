"""Labels that were turned around are found where the model and the words know better."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import furnish, rows_of, sentence, train, write_rows
from upweight.trust.suspects import Judged, suspects
from upweight.trust.words import FOLDS, Compared, count_words, log_odds

GOOD, BAD = 7, 8


def compared(num: int, draw: random.Random, flipped: set[int]) -> list[Compared]:
    """One word says which response is the better one; the rest says nothing."""
    found: list[Compared] = []
    for i in range(num):
        noise = [tuple(draw.randrange(10, 30) for _ in range(4)) for _ in range(2)]
        better, worse = (*noise[0], GOOD), (*noise[1], BAD)
        pair = (worse, better) if i in flipped else (better, worse)
        found.append(Compared((100 + i,), *pair))
    return found


def judged(num: int, flipped: set[int], noise: float = 0.3) -> list[Judged]:
    draw = random.Random(3)
    return [
        Judged("heldout", c, (-1 if i in flipped else 1) + draw.gauss(0, noise))
        for i, c in enumerate(compared(num, draw, flipped))
    ]


def test_planted_flips_are_found_and_nothing_else():
    flipped = {3, 17, 40, 41, 77}
    found = suspects(judged(100, flipped), 0.8)
    assert {s.index for s in found} == flipped
    assert all(s.model > 4 and s.words > 4 for s in found)
    # What speaks against the label: the good word is in the rejected response.
    assert all({GOOD, BAD} >= set(s.tokens[:2]) for s in found)
    odds = [s.model * s.words for s in found]
    assert odds == sorted(odds, reverse=True)


def test_right_labels_give_no_suspects():
    assert suspects(judged(100, set()), 0.8) == []


def test_one_judge_alone_is_not_enough():
    flipped = {3, 17, 40}
    right = judged(100, flipped)
    draw = random.Random(4)
    # A model that knows nothing, and words that know nothing.
    noise = [Judged(j.set, j.compared, draw.gauss(0, 1)) for j in right]
    assert suspects(noise, 0.8) == []
    silent = [Judged(j.set, Compared(j.compared.prompt, (10,), (10,)), j.margin) for j in right]
    assert suspects(silent, 0.8) == []


def test_each_set_has_a_scale_of_its_own():
    flipped = {3, 17, 40}
    early = [
        Judged("train", j.compared, j.margin / 1000) if i < 60 else j
        for i, j in enumerate(judged(100, flipped))
    ]
    assert {s.index for s in suspects(early, 0.8)} == flipped


def test_a_model_that_holds_most_labels_wrong_is_no_judge():
    flipped = {3, 17, 40}
    turned = [Judged(j.set, j.compared, -j.margin) for j in judged(100, flipped)]
    # Its margin on each flipped label is above 0: it speaks for them, and not against.
    assert suspects(turned, 0.8) == []


def test_few_prompts_are_not_judged():
    assert suspects(judged(2 * FOLDS - 1, {1}), 0.8) == []


def test_words_are_counted_without_the_prompt_that_is_asked_about():
    draw = random.Random(5)
    # Each prompt has a word of its own in the chosen response of its two preferences.
    pairs = [
        Compared((i,), (1000 + i, *[draw.randrange(10) for _ in range(3)]), (2000 + i, 1, 2, 3))
        for i in range(40)
        for _ in range(2)
    ]
    words = count_words(pairs)
    assert words is not None
    for index, pair in enumerate(pairs):
        weights = words.weights[words.fold[index]]
        # Seen on neither side elsewhere: only the sides' totals, which are alike, are left.
        assert abs(weights[pair.chosen[0]] - weights[pair.rejected[0]]) < 1e-9


def test_word_margins_are_those_of_naive_bayes_counted_by_hand():
    draw = random.Random(6)
    pairs = compared(23, draw, set())
    words = count_words(pairs)
    assert words is not None
    fold = [i % FOLDS for i in range(23)]
    size = 1 + max(max(c.chosen + c.rejected) for c in pairs)
    for i, pair in enumerate(pairs):
        sides = {"chosen": [1.0] * size, "rejected": [1.0] * size}
        for j, other in enumerate(pairs):
            if fold[j] != fold[i]:
                for side, counts in sides.items():
                    for token in getattr(other, side):
                        counts[token] += 1
        totals = {side: sum(counts) for side, counts in sides.items()}

        def of(tokens: tuple[int, ...], sides: Any = sides, totals: Any = totals) -> float:
            return sum(
                math.log(sides["chosen"][t] / totals["chosen"])
                - math.log(sides["rejected"][t] / totals["rejected"])
                for t in tokens
            )

        expected = of(pair.chosen) - of(pair.rejected)
        assert words.margins(pairs)[i] == pytest.approx(expected, abs=1e-9)


def test_log_odds_are_stationary_points_of_the_ridge_on_the_other_folds():
    draw = np.random.default_rng(0)
    x, fold = draw.normal(size=(60, 2)) + 0.4, np.arange(60) % 3
    found = log_odds(x, fold)
    scaled = x / np.sqrt((x**2).mean(0))
    for f in range(3):
        held = fold == f
        weights = np.linalg.lstsq(scaled[held], found[held], rcond=None)[0]
        rest = scaled[~held]
        slope = rest.T @ (1 / (1 + np.exp(rest @ weights))) - weights
        assert np.abs(slope).max() < 1e-8


# Whole runs


def sentiments(flipped: set[int], num: int = 240) -> list[dict[str, str]]:
    draw = random.Random(8)
    rows: list[dict[str, str]] = []
    for i in range(num):
        better, worse = f"fine {sentence(draw, 4)}", f"awful {sentence(draw, 4)}"
        if i in flipped:
            better, worse = worse, better
        rows.append({"prompt": f"question {i}", "chosen": better, "rejected": worse})
    return rows


TRAINED = ("--pairs_per_step", "8", "--learning-rate", "3e-3", "--samples", "0")
TRAINED += ("--evaluation.every", "99", "--shortcut", "0.999", "--suspect", "0.7")


def line_of(row: str) -> int:
    return int(row.rsplit(":", 1)[1]) - 1


def test_a_run_names_its_flipped_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    furnish(tmp_path, monkeypatch)
    flipped = set(random.Random(9).sample(range(240), 36))
    write_rows("pairs.jsonl", sentiments(flipped))
    assert train("run", *TRAINED) == 0
    found = rows_of("run/suspects.jsonl")
    right = [line_of(row["row"]) in flipped for row in found]
    # 15 % of all labels are flipped: by chance 0.15 of those named would be.
    assert sum(right) / len(right) > 0.9
    assert len({row["row"] for row in found if line_of(row["row"]) in flipped}) > 18
    assert {row["set"] for row in found} == {"train", "heldout"}
    assert f"labels: {len(found)} of 240 preferences" in capsys.readouterr().err
    for row in found:
        assert row["rejected"].startswith("fine") or line_of(row["row"]) not in flipped
        assert row["margin"] < 0 and "to 1" in row["why"] and "question" in row["prompt"]
    page = Path("run/report.html").read_text()
    assert "<h2>Labels to review</h2>" in page and "Labelled rejected" in page
    # Each training pair has one margin, from before it was trained on.
    lines = rows_of("run/margins.jsonl")
    noted = [row for line in lines for row, *_ in line["margins"]]
    trained = json.loads(Path("run/account.json").read_text())["sets"]["train"]["preferences"]
    assert len(noted) == len(set(noted)) == trained
    assert all(margin == 0 for *_, margin in lines[0]["margins"])


def test_a_run_without_flips_names_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    furnish(tmp_path, monkeypatch)
    write_rows("pairs.jsonl", sentiments(set()))
    assert train("run", *TRAINED, "--epochs", "2") == 0
    assert len(rows_of("run/suspects.jsonl")) <= 2
    assert len(rows_of("run/margins.jsonl")) == len(
        [r for r in rows_of("run/metrics.jsonl") if r["kind"] == "train" and r["epoch"] <= 1.001]
    )
