"""Are wrong labels found? Flips a known share of labels, trains, and compares with suspects.jsonl.

    python benchmarks/flips.py [--task manners | films] [--share 0.15] [--pairs 240]

manners: a kind and a curt answer to a request, each put together from a dozen phrases. films: the
demo model's own answers, of which VADER's sentiment prefers one clearly; in one short epoch the
model learns little of that. Some preferences are turned around, in training and held-out rows
alike. A second run without flips says how many labels are suspected where none is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results
import upweight as uw
from upweight.config import Watch
from upweight.models.named import demo_model_path

DEMO = Path(uw.__file__).parent / "demo"
MIN_GAP = 0.4
LEVELS = (0.6, 0.7, 0.8, 0.9)

KIND = (
    ("Of course", "Gladly", "With pleasure", "Happy to help", "Good question", "Certainly"),
    ("let us look at", "here is a start on", "I can explain", "we will go through"),
    ("step by step.", "together.", "whenever you are ready.", "and take our time."),
)
CURT = (
    ("No", "Hardly", "Not now", "Why ask me", "What a bore", "Again"),
    ("go and read about", "nobody needs", "do not bother me with", "find out yourself about"),
    ("somewhere else.", "and be quick.", "for once.", "or leave it."),
)
TOPICS = ("taxes", "bees", "maps", "bread", "rain", "chess", "rust", "tides", "fonts", "glass")
ASKING = ("Explain", "Tell me about", "I need help with", "What should I know about")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--pairs", type=int, default=240, help="training pairs")
    parser.add_argument("--task", choices=("manners", "films"), default="manners")
    args = parser.parse_args()
    default = Watch().suspect
    lines: list[list[str]] = []
    record: dict[str, Any] = {"share": args.share}
    for share in (args.share, 0.0):
        num, flipped, found = trained(args.task, share, args.pairs)
        record[f"run_{share}"] = {"num": num, "flipped": sorted(flipped), "suspects": found}
        for name in ("train", "heldout"):
            planted = {key for key in flipped if key[0] == name}
            for level in LEVELS:
                sure = [s for s in found if s["set"] == name and certain(s) >= level]
                right = sum((name, s["row"]) in planted for s in sure)
                lines.append(
                    [
                        f"{share:.0%}",
                        name,
                        f"{num[name]}",
                        f"{len(planted)}",
                        f"{level}{' (default)' if level == default else ''}",
                        f"{len(sure)}",
                        f"{right / len(sure):.2f}" if sure and planted else "-",
                        f"{right / len(planted):.2f}" if planted else "-",
                    ]
                )
    head = ["flipped", "set", "pairs", "flips", "watch.suspect", "suspects", "precision", "recall"]
    text = (
        "# Wrong labels that are found\n\nSmolLM2-135M-Instruct (LoRA, one epoch), task: "
        f"{args.task}. Training pairs are judged as the "
        "policy first met them, held-out ones by the finished policy. By chance the precision "
        "would be the share that is flipped.\n\n" + results.markdown_table(head, lines)
    )
    print(text)
    print(results.save(f"flips-{args.task}", text, record))


def certain(suspect: dict[str, Any]) -> float:
    """How sure the less sure of the two judges is that the label is wrong."""
    odds = min(suspect["odds_model"], suspect["odds_words"])
    return odds / (1 + odds)


def trained(
    task: str, share: float, num_pairs: int
) -> tuple[dict[str, int], set[tuple[str, str]], list[dict[str, Any]]]:
    """(pairs by set, (set, row) of those flipped, lines of suspects.jsonl)."""
    with tempfile.TemporaryDirectory() as folder:
        num: dict[str, int] = {}
        flipped: set[tuple[str, str]] = set()
        for name in ("train", "heldout"):
            rows = manners(name, num_pairs) if task == "manners" else list(films(name))[:num_pairs]
            num[name] = len(rows)
            draw = random.Random(f"{name}:{share}")
            for line in draw.sample(range(len(rows)), round(share * len(rows))):
                rows[line] |= {
                    "chosen": rows[line]["rejected"],
                    "rejected": rows[line]["chosen"],
                }
                flipped.add((name, f"{folder}/{name}.jsonl:{line + 1}"))
            path = Path(folder, f"{name}.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        uw.train(
            **{
                "model": demo_model_path(),
                "data": f"{folder}/train.jsonl",
                "evaluation.sets": {"heldout": [f"{folder}/heldout.jsonl"]},
                "evaluation.samples": 0,
                "evaluation.every": 10**6,
                "out": f"{folder}/run",
                "loss.beta": 0.05,
                "batch.pairs_per_step": 8,
                "optimizer.learning_rate": 5e-4,
                "lora.rank": 16,
                "preflight.shortcut": 0.999,
                "watch.suspect": 0.5,
            }
        )
        text = Path(folder, "run", "suspects.jsonl").read_text()
        return num, flipped, [json.loads(line) for line in text.splitlines()]


def manners(name: str, num: int) -> list[dict[str, str]]:
    draw = random.Random(name)
    rows: list[dict[str, str]] = []
    for i in range(num if name == "train" else num // 3):
        topic = draw.choice(TOPICS)
        kind, curt = (
            "{}, {} {} {}".format(
                *(draw.choice(x) for x in parts[:2]), topic, draw.choice(parts[2])
            )
            for parts in (KIND, CURT)
        )
        prompt = f"{draw.choice(ASKING)} {topic} ({name} {i})."
        rows.append({"prompt": prompt, "chosen": kind, "rejected": curt})
    return rows


def films(name: str) -> Iterator[dict[str, str]]:
    """The best answer over the worst of a prompt, the second best over the second worst, ..."""
    for line in (DEMO / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers: Sequence[dict[str, Any]] = sorted(row["responses"], key=lambda a: a["score"])
        for low, high in zip(answers[: len(answers) // 2], reversed(answers), strict=False):
            if high["score"] - low["score"] > MIN_GAP:
                yield {"prompt": row["prompt"], "chosen": high["text"], "rejected": low["text"]}


if __name__ == "__main__":
    main()
