"""What `upweight check` measures and prints for machines, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

FIGURES: dict[str, str] = {
    "cut": "responses cut on one side, or rows too long: the larger share",
    "identical": "rows dropped because chosen and rejected are the same",
    "contradictory": "preferences that contradict each other",
    "repeated": "rows that say the same as an earlier one, or nearly",
    "similar": "preferences whose responses are nearly the same",
    "longer": "preferences in which the longer response is the chosen one",
    "words": "preferences in which a count of words finds the chosen one",
    "alone_nats": "nats a token, at most, between a row packed or padded and the row alone",
    "likelier": "preferences in which the reference finds the chosen one likelier by the token",
    "data_nats": "nats a token: the likelier response of a preference, under the reference",
    "own_nats": "nats a token: what the reference answers itself",
    "start_nats": "nats a token, at most, between policy and reference before step 1",
}
"""What is measured of each set before step 1: shares, and nats where the name says so."""

FIELDS: dict[str, str] = {
    "template": "chat or none: how text is rendered",
    "sets": "the account of each set, train first: rows read = used + dropped by reason, with the "
    "first rows of each; what was cut, by side; stop tokens appended; percentiles of lengths",
    "findings": "what is suspicious: code, said (a sentence) and rows",
    "figures": "what was measured of each set: value, low and high, its 95 % interval",
    "unwatched": "sentences: what the watch will not see in this run, why, and what to set",
    "model": "its name, and a description: parameters, dtype, device, how prompts are shared",
    "plan": "total_steps, steps_per_epoch, learning_rate, and when is evaluated and saved",
    "memory": "bytes of weights, gradients and moments, tokens of a bin, what is needed and free",
    "rows": "the first three training rows as they are scored: row, prompt, prompt_tokens, and for "
    "each response its role, scored text, stop token (null where it was cut off) and tokens",
    "verdict": "one sentence: what training would need, and how many warnings there are, by code",
    "later_stages": "of a run.yaml with stages: the same object for each stage after the first",
}
"""The object that `upweight check --json` prints with status 0."""


def as_markdown() -> str:
    """docs/check.md."""
    return "\n".join(
        [
            "# upweight check",
            "",
            "Everything that can be known before step 1, in seconds, and nothing written: the rows "
            "and their account, what is suspicious about them, three rows as they are scored, the "
            "plan of steps and memory, what reward functions give the answers of a few rows, and "
            "what the model says of a few. `train` does the same first.",
            "",
            "What may be wrong stands together at the end, and the last line is the verdict: "
            "`ready to train`, or the error. An `out` that holds a run already is no error here: "
            "the verdict says that `train` would need another one.",
            "",
            "Status 0, also with warnings; 2 where training would be refused. A code is explained "
            "by `upweight explain CODE` and in [codes.md](codes.md).",
            "",
            "## For machines",
            "",
            "`upweight check --json` prints one object. With status 2 it has `error`: an object of "
            "`code` (null for a mistake that is no diagnosis) and `message`; where the rows are "
            "refused also `template`, `sets`, `findings` (all refusals among them) and `figures`. "
            "With status 0:",
            "",
            *_table("field", FIELDS),
            "",
            "## Figures",
            "",
            "Of each set, `alone_nats` and `start_nats` of the training set alone. A run has them "
            "in its `account.json`. What the reference says, a run asks about all rows and `check` "
            "about a few. A figure that cannot be measured is missing, and a bound is null.",
            "",
            *_table("figure", FIGURES),
            "",
        ]
    )


def _table(heading: str, rows: Mapping[str, str]) -> list[str]:
    return [
        f"| {heading} | |",
        "|---|---|",
        *(f"| `{name}` | {about} |" for name, about in rows.items()),
    ]
