"""Which objective reads which key."""

from __future__ import annotations

from upweight.config.keys import keys


def of_section(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


_REPEATS = of_section("preflight", "cut", "repeated", "edits")
_ROWS_LEARNED = (
    *of_section("data", "format", "truncation", "pairing", "min_score_gap"),
    "batch.pairs_per_step",
    *_REPEATS,
    *of_section("preflight", "identical", "empty", "spans", "markers", "contradictory"),
)
_PAIRS = (*_ROWS_LEARNED, *of_section("preflight", "similar", "shortcut"))
_ANSWERS = (
    *("reference", "export.merge"),
    *of_section(
        "evaluation", "prompt_files", "samples", "max_new_tokens", "temperature", "true_reward"
    ),
    *of_section("watch", "length", "repetition", "stopped", "below"),
)
# Supervised fine-tuning is meant to leave its start.
_DISTANCE = ("watch.kl",)
_MARGINS = of_section("watch", "displaced", "solved", "learned", "spread", "flat")
# A prompt has no responses that could nearly be another's.
_ROUNDS = (
    *_ANSWERS,
    *_DISTANCE,
    *of_section("preflight", "cut", "repeated", "spans", "markers"),
    *("rollout", "loss.beta", "watch.patience"),
)
_SURROGATE = of_section("policy", "clip_low", "clip_high", "kl_estimator", "kl_target", "kl_stop")
_GROUP = of_section("policy", "advantages", "aggregation")
_VALUES = of_section(
    "policy",
    *("aggregation", "value", "value_coefficient", "value_clip", "value_learning_rate"),
    *("discount", "trace", "whiten"),
)

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *_ANSWERS,
        *_DISTANCE,
        *_PAIRS,
        *_MARGINS,
        *of_section("loss", "beta", "label_smoothing"),
        *of_section("preflight", "swapped", "improbable"),
        *of_section("watch", "known", "easy", "suspect"),
    ),
    "sft": (*_ANSWERS, *_ROWS_LEARNED, "data.turns", "data.learn"),
    "reward": (
        *_PAIRS,
        *of_section("loss", "label_smoothing", "margin", "centering"),
        "preflight.swapped",
        *of_section("watch", "solved", "learned", "known", "easy"),
    ),
    "ppo": (*_ROUNDS, *_SURROGATE, *_VALUES),
    "grpo": (*_ROUNDS, *_SURROGATE, *_GROUP),
    "rloo": (*_ROUNDS, *_SURROGATE, *_GROUP),
    "online_dpo": (*_ROUNDS, *_MARGINS, "loss.label_smoothing"),
}
"""The keys, or whole sections, that not every objective reads, beside each objective that does.

A key that no line names is read by every objective, in `train` and `check`.
"""


CHOOSING = frozenset(
    (
        *("objective", "model", "out", "resume", "seed", "rollout.reward", "batch.tokens_per_bin"),
        *of_section("data", "template", "template_options", "date", "max_length"),
        *of_section(
            "evaluation", "prompt_files", "samples", "max_new_tokens", "temperature", "true_reward"
        ),
        *of_section(
            "compute", "dtype", "device", "attention", "sharing", "threads", "trust_remote_code"
        ),
        "lora.quantize",
    )
)
"""The keys that best_of_n reads, which trains nothing: answers to the prompts of an evaluation are
drawn, and its reward chooses among them."""


COMPARING = ("grpo", "rloo", "online_dpo")
"""The objectives that hold the answers to one prompt against each other."""


def draws(objective: str) -> bool:
    """Whether it learns from answers that it draws, round by round."""
    return "rollout" in OBJECTIVES.get(objective, ())


def default_passes(objective: str) -> int:
    """Passes over a round's answers where rollout.passes is null."""
    return 4 if objective == "ppo" else 1


def objectives_reading(key: str) -> list[str]:
    """The objectives that read the key with this full name."""
    names = {key, keys()[key].section}
    own = [objective for objective, said in OBJECTIVES.items() if names.intersection(said)]
    return own or list(OBJECTIVES)


def unread(objective: str) -> list[str]:
    """The keys that this objective does not read."""
    return [key for key in keys() if objective not in objectives_reading(key)]


CALLED_ELSEWHERE = {
    "sigmoid": " That is dpo.",
    "cdpo": " That is dpo with loss.label_smoothing.",
    "rm": " That is reward.",
    "best_of_n": " It trains nothing: a method of `upweight compare`.",
    **dict.fromkeys(("ipo", "hinge", "robust", "kto", "orpo", "simpo", "cpo", "bco"), " It is none "
    "that upweight has."),
}  # fmt: skip
"""What other programs call a loss: what it is here, if it is here."""
