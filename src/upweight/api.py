"""The verbs of the command line as functions: `import upweight as uw; uw.train(...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upweight.config import load_run, load_stages
from upweight.recipes.check import Checked
from upweight.recipes.look import look
from upweight.recipes.score import sample_file, score_file
from upweight.recipes.stages import check_stages, train_stages
from upweight.recipes.train import Result
from upweight.terminal import default_screen

__all__ = ["check", "sample", "score", "train"]


def train(config: str | Path | None = None, **values: Any) -> Result:
    """Align a model with preferences; every key of run.yaml is a keyword, short names included.

    `uw.train(model=..., data=..., beta=0.1, out="runs/a")`. Of several `stages` the result is that
    of the last, or of the one that was stopped. Raises UpweightError.
    """

    stages = load_stages(config, values=values, required=("out",))
    look("train", stages)
    with default_screen() as screen:
        return train_stages(stages, screen)


def check(config: str | Path | None = None, **values: Any) -> Checked:
    """What can be known before step 1: the account of the rows, what was measured of them and is
    suspicious, the first rows as they are scored. Raises UpweightError for what train refuses."""

    stages = load_stages(config, values=values)
    look("check", stages)
    with default_screen() as screen:
        return check_stages(stages, screen)


def score(*, overwrite: bool = False, **values: Any) -> list[dict[str, object]]:
    """Log-probs, and with `reference` implicit rewards and margins, per preference, in nats; of a
    reward model its scores and margins.

    `uw.score(model=..., reference=..., data=..., out="scores.jsonl")`; without `out` nothing is
    written, and a file that holds something is replaced only where it is to `overwrite`.
    """

    return score_file(load_run(None, values=values).run, overwrite=overwrite)


def sample(
    model: str,
    prompts: Sequence[str] | str,
    *,
    num: int = 1,
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    overwrite: bool = False,
    **values: Any,
) -> list[dict[str, object]]:
    """`num` responses to each prompt of the files `prompts`, with their log-probs in nats.

    temperature 0 takes the likeliest token; max_new_tokens is 64 unless told otherwise, as on the
    command line. Without `out` nothing is written, and a file that holds something is replaced
    only where it is to `overwrite`.
    """

    settings: Mapping[str, Any] = {
        **values,
        "model": model,
        "data.path": prompts,
        "evaluation.temperature": temperature,
    }
    run = load_run(None, values=settings).run
    return sample_file(run, num=num, top_p=top_p, overwrite=overwrite)
