"""Keys of runs that draw answers, and what they refuse together."""

from __future__ import annotations

import pytest

from upweight.config import load_run
from upweight.errors import ConfigError

BASE = {"model": "m", "data.path": "p.jsonl", "rollout.reward": "vader"}


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_a_policy_gradient_runs_without_a_kl_term(objective: str):
    assert load_run(None, values={**BASE, "objective": objective, "beta": 0}).run.loss.beta == 0


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"objective": "dpo", "beta": 0}, "beta must be above 0 for dpo"),
        ({"objective": "online_dpo", "beta": 0}, "beta must be above 0 for online_dpo"),
        ({"objective": "ppo", "beta": 0, "kl_target": 4}, "policy.kl_target multiplies"),
        ({"objective": "grpo", "lora.dropout": 0.1}, "answers are drawn without dropout"),
    ],
)
def test_what_cannot_be_meant_together_is_refused(own: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        load_run(None, values={**BASE, **own})


def test_dropout_is_an_option_of_online_dpo():
    values = {**BASE, "objective": "online_dpo", "lora.dropout": 0.1}
    assert load_run(None, values=values).run.lora is not None
