"""What each objective needs: from the rows, from the reference, and by default."""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS = "prompts"
"""The set of evaluation.prompt_files."""


@dataclass(frozen=True)
class Kind:
    """`rows`: preferences, responses (without preferences) or prompts alone. `full` and `lora` are
    the default learning rates. `by_reference`: the reference is asked about every row before
    step 1. `answers`: what is trained answers prompts (a reward model does not)."""

    rows: str
    full: float
    lora: float
    by_reference: bool = False
    answers: bool = True
    num_responses: int = 1
    kl: str | None = None
    group: str | None = None
    aggregation: str = "token"

    @property
    def draws(self) -> bool:
        """Whether it learns from answers that are drawn while it is trained."""
        return self.rows == "prompts"


KINDS: dict[str, Kind] = {
    "dpo": Kind("preferences", 5e-7, 1e-5, by_reference=True),
    "sft": Kind("responses", 1e-5, 1e-4),
    "reward": Kind("preferences", 1e-5, 1e-4, answers=False),
    "ppo": Kind("prompts", 1e-6, 1e-5, kl="k1"),
    "grpo": Kind(
        "prompts", 1e-6, 1e-5, num_responses=8, kl="k1", group="grpo", aggregation="response"
    ),
    "rloo": Kind("prompts", 1e-6, 1e-5, num_responses=4, kl="k1", group="rloo"),
    "online_dpo": Kind("prompts", 5e-7, 1e-5, num_responses=2),
}
