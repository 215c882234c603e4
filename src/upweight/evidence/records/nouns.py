"""What the files of a run directory say, one frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Values = Mapping[str, float]
Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of metrics.jsonl. `set` is the evaluation set's name, None for a training step.

    An absent metric is not in `values`; one that was not finite when written is nan.
    """

    step: int
    epoch: float
    set: str | None
    values: Values


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One preference of an evaluation: log-probs and rewards in nats, texts in its last one."""

    step: int
    set: str
    row: str
    chosen: int
    rejected: int
    logp_chosen: float
    logp_rejected: float
    ref_logp_chosen: float
    ref_logp_rejected: float
    reward_chosen: float
    reward_rejected: float
    margin: float
    tokens_chosen: int
    tokens_rejected: int
    prompt_text: str | None
    chosen_text: str | None
    rejected_text: str | None


@dataclass(frozen=True, slots=True)
class Sample:
    """What policy and reference say to one prompt. Log-probs, in nats, are of the policy's."""

    step: int
    set: str
    prompt: str
    policy: str
    reference: str
    policy_tokens: int | None
    reference_tokens: int | None
    policy_logp: float | None
    policy_reference_logp: float | None


@dataclass(frozen=True, slots=True)
class SetAccount:
    """The account of one set's rows: read = used + the dropped, by reason.

    `examples` names up to five rows of each reason as (row, detail). `truncated` counts responses
    by the side that was cut. `lengths` are tokens, by part and percentile. `left_out` counts the
    responses of used rows that are not trained on, by reason.
    """

    read: int
    used: int
    dropped: Mapping[str, int]
    examples: Mapping[str, tuple[tuple[str, str], ...]]
    truncated: Mapping[str, int]
    appended_stop: int
    preferences: int
    responses: int
    lengths: Mapping[str, Values]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of run.yaml: its dotted key, its value as written, and where it came from."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One line of evaluation.json: a quantity for reference and policy, already in words."""

    name: str
    reference: str
    policy: str
    note: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """evaluation.json: what a run measured beyond its preferences, as a table."""

    title: str
    rows: tuple[ComparisonRow, ...]


@dataclass(frozen=True, slots=True)
class Warned:
    """A diagnosis that was reported: before step 1, where `step` is None, or after a step.

    `metric` is the one whose curve shows it, of the evaluation set `set` or, without one, of the
    training steps. `refused`: it ended the run.
    """

    code: str
    said: str
    rows: tuple[str, ...]
    step: int | None
    metric: str = ""
    set: str | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Suspected:
    """A preference whose label policy and words contradict; the odds are against the label."""

    set: str
    row: str
    prompt: str
    chosen: str
    rejected: str
    margin: float
    odds_model: float
    odds_words: float
    why: str


@dataclass(frozen=True, slots=True)
class Records:
    """Everything a run directory says.

    `train` is in step order; `evals` in step order by set. `ledger` holds only the rows of each
    set's last evaluation. `notes` are sentences about what is missing or was cut off.
    """

    name: str
    train: tuple[Measurement, ...] = ()
    evals: Mapping[str, tuple[Measurement, ...]] = field(default_factory=dict)
    ledger: tuple[LedgerRow, ...] = ()
    samples: tuple[Sample, ...] = ()
    suspects: tuple[Suspected, ...] = ()
    accounts: Mapping[str, SetAccount] = field(default_factory=dict)
    template: str | None = None
    warnings: tuple[Warned, ...] = ()
    settings: tuple[Setting, ...] = ()
    environment: Json = field(default_factory=dict)
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()

    def setting(self, key: str) -> str | None:
        """The value of a dotted key of run.yaml as written there, None where it is not there."""
        return next((s.value for s in self.settings if s.key == key), None)
