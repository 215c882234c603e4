"""Models with a scalar head in training: what a run switched on stays on in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from oracles import loaded, tree_of
from runs import furnish
from upweight.config import Run, load_run
from upweight.data.pack import collate
from upweight.models.export import export_reward_model
from upweight.models.load import LanguageModel
from upweight.models.scalar import score_head, with_scalar_head
from upweight.recipes.online import values_of
from upweight.recipes.prepare import load_policy
from upweight.recipes.screen import Silent
from upweight.recipes.start import Start, trained
from upweight.recipes.state import State, Values, make_room


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def run_of(objective: str, **values) -> Run:
    settings = {"model": "model", "data": "pairs.jsonl", "dtype": "float32", **values}
    return load_run(None, values={"objective": objective, **settings}).run


def saved_reward_model(lm: LanguageModel) -> str:
    scored = with_scalar_head(lm, {2}, seed=1)
    return str(export_reward_model(scored, Path("judge"), [tree_of((50,), [[60], [61]], ())]))


def state_of(lm: LanguageModel, values: Values | None) -> State:
    """As much of a run as its models are."""
    begun, state = object.__new__(Start), object.__new__(State)
    object.__setattr__(begun, "lm", lm)
    state.begun, state.values, state.screen = begun, values, Silent()
    state.recomputing, state.tokens_per_bin = False, 64
    return state


def recomputing(lm: LanguageModel) -> list[bool]:
    layers = [m for m in lm.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [m.training and m.gradient_checkpointing for m in layers]


def dropping(lm: LanguageModel) -> list[bool]:
    return [m.training for m in lm.model.modules() if isinstance(m, torch.nn.Dropout)]


def test_a_reward_model_is_trained_with_the_dropout_and_recomputation_that_were_asked_for():
    run = run_of("reward", **{"lora.dropout": 0.5, "compute.checkpointing": True})
    lm = trained(run, load_policy(run), [2])
    assert len(recomputing(lm)) == 2 and all(recomputing(lm))
    assert dropping(lm) and all(dropping(lm))


@pytest.mark.parametrize("how", [{"attention": "dense"}, {"sharing": False}])
@pytest.mark.parametrize("start", ["the policy", "the reward model"])
def test_a_value_model_is_made_by_the_runs_settings(start, how):
    judge = {"rollout.reward": saved_reward_model(loaded())} if start != "the policy" else {}
    settings = {"trust_remote_code": True, **judge, **how}
    run = run_of("ppo", **{"lora": True, "compute.checkpointing": True, **settings})
    lm = load_policy(run)
    values = values_of(run, lm, [2])
    assert values is not None and values.critic is not None
    assert len(recomputing(values.critic)) == 2 and all(recomputing(values.critic))
    assert values.critic.plan == lm.plan
    assert values.critic.trust_remote_code
    # What whole answers are worth says nothing of their beginnings: the head is learned anew.
    assert not score_head(values.critic.model).weight.any()


def test_out_of_memory_recomputes_the_value_models_layers_too():
    run = run_of("ppo", **{"rollout.reward": "number"})
    lm = load_policy(run)
    state = state_of(lm, values_of(run, lm, [2]))
    assert make_room(state, "step 1", collate([tree_of((50,), [[60]], ())]))
    critic = state.values and state.values.critic
    assert critic is not None
    assert all(recomputing(lm)) and all(recomputing(critic))
