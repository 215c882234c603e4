"""Keys that say from where on something is refused or reported."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from upweight.config.base import Count, NotNegative, Positive, Section, Share


class Preflight(Section):
    """from when on the rows are reported or refused, before step 1"""

    cut: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2,
        description="Responses of either side, or prompts, that are cut, or rows and responses "
        "too long, as a share: more is refused (UW205).",
    )
    swapped: Share = Field(
        default=0.25,
        description="Preferences in which the reference agrees, as a share: fewer may be swapped "
        "(UW207).",
    )
    identical: Share = Field(
        default=0.01,
        description="Rows dropped because chosen and rejected are the same, as a share (UW206).",
    )
    empty: Share = Field(
        default=0.02,
        description="Rows, or responses, that are not used because a response has no word, as a "
        "share (UW210).",
    )
    dropped: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2,
        description="Rows dropped, for all reasons together, as a share: more is refused; of rows "
        "that prefer no response, more than half is reported (UW208).",
    )
    contradictory: Share = Field(
        default=0.01,
        description="Preferences that contradict each other (UW210), or the scores beside them "
        "(UW207), as a share.",
    )
    repeated: Share = Field(
        default=0.05,
        description="Rows that repeat an earlier one, or nearly, as a share (UW210).",
    )
    spans: Share = Field(
        default=0.2,
        description="Rows whose tokens do not come apart into prompt, response and one stop, as a "
        "share: more is refused (UW201 to UW204).",
    )
    markers: Share = Field(
        default=0.02,
        description="Rows that hold what another chat template writes, such as [INST], as a share "
        "(UW204).",
    )
    similar: Share = Field(
        default=0.1,
        description="Preferences whose responses are nearly the same, as a share (UW210).",
    )
    edits: Share = Field(
        default=0.05,
        description="Tokens that differ between responses that are nearly the same, as a share.",
    )
    shortcut: Share = Field(
        default=0.8, description="Accuracy of length alone, or of words alone, as a share (UW211)."
    )
    improbable: NotNegative = Field(
        default=2.0,
        description="Nats a token by which the data may lie below the reference's own answers "
        "(UW212).",
    )
    reach: NotNegative = Field(
        default=2e-6,
        description="How far a whole run can move a weight, which is the sum of its learning "
        "rates; less is reported (UW103).",
    )


class Watch(Section):
    """from when on what happens during training is reported"""

    moved: Share = Field(
        default=0.5,
        description="Weights that the first step must move, as a share, of those in half precision "
        "(UW104); and of the others, before layers that stand still are refused (UW103).",
    )
    patience: Count = Field(
        default=64,
        description="Steps in which no answer earns more than those that it is compared with, or a "
        "layer of the value model stands still: then a run is refused (UW103).",
    )
    displaced: NotNegative = Field(
        default=0.5,
        description="Nats a token that chosen responses may lose, of training or held out (UW304).",
    )
    length: Annotated[float, Field(ge=1)] = Field(
        default=3.0,
        description="How many times the reference's an answer's length may be, or its inverse; "
        "of sft also how many times the training responses' (UW305).",
    )
    repetition: Share = Field(
        default=0.2,
        description="Four tokens in a row that an answer has had before, as a share: so much more "
        "of them than in the reference's answers (UW305).",
    )
    stopped: Share = Field(
        default=0.5,
        description="Answers that end by themselves, as a share of the reference's that do: fewer "
        "are reported (UW305).",
    )
    solved: Share = Field(
        default=0.995,
        description="Training pairs told apart, as a share, at a loss of next to nothing (UW306).",
    )
    learned: NotNegative = Field(
        default=4.6,
        description="Beta times the margin from which a pair has nothing left to teach, and so its "
        "loss: at 4.6, 0.01 (UW306).",
    )
    known: Share = Field(
        default=0.9,
        description="Training pairs told apart, as a share, that count as known: held-out ones "
        "must then be better than chance (UW306).",
    )
    easy: Share = Field(
        default=0.97, description="Held-out pairs surely told apart, as a share (UW306)."
    )
    spread: Positive = Field(
        default=10.0,
        description="Mean size of beta times the margin of pairs not trained on yet (UW307).",
    )
    flat: NotNegative = Field(
        default=0.01,
        description="Mean size of beta times the margin at the end; less is reported (UW307).",
    )
    kl: NotNegative = Field(
        default=50.0, description="Nats an answer from the reference, sampled (UW308)."
    )
    below: NotNegative = Field(
        default=0.1,
        description="Nats an answer below 0 that a sampled KL may lie (UW308).",
    )
    suspect: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        default=0.8,
        description="How sure policy and words must be, each, that a label is wrong, before it is "
        "in suspects.jsonl.",
    )
