"""What is said is what runs: every key arrives, or is refused with its place and its neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from upweight.config import (
    OBJECTIVES,
    READS,
    Data,
    Lora,
    Loss,
    Resolved,
    Run,
    dump,
    flags,
    leaf_values,
    load_run,
    require_read,
    unread,
    values_from_flags,
)
from upweight.config.keys import keys
from upweight.config.objectives import objectives_reading
from upweight.config.sections import SECTIONS
from upweight.config.written import parse, parse_value, settle, write
from upweight.errors import ConfigError, Refusal

NEEDED = {"model": "tiny", "data": "a.jsonl"}

# A value other than the default for every key there is, and what else it needs to make sense.
OTHER: dict[str, Any] = {
    "model": "other",
    "reference": "sft",
    "out": "runs/a",
    "objective": "sft",
    "epochs": 2.5,
    "steps": 7,
    "seed": 3,
    "resume": True,
    "track": ["wandb"],
    "log_every": 10,
    "data.path": ["b.jsonl", "c.jsonl"],
    "data.format": "pair",
    "data.template": "none",
    "data.template_options": {"enable_thinking": False},
    "data.date": "2024-07-05",
    "data.max_length": 512,
    "data.truncation": "prompt",
    "data.pairing": "extremes",
    "data.min_score_gap": 0.5,
    "data.limit": 100,
    "data.learn": "all",
    "data.turns": "all",
    "loss.beta": 0.05,
    "loss.label_smoothing": 0.1,
    "loss.margin": 0.5,
    "loss.centering": 0.01,
    "batch.pairs_per_step": 8,
    "batch.tokens_per_bin": 1024,
    "optimizer.learning_rate": 3e-5,
    "optimizer.weight_decay": 0.01,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.95,
    "optimizer.epsilon": 1e-6,
    "optimizer.moments": "8bit",
    "optimizer.max_grad_norm": None,
    "optimizer.warmup": 0.0,
    "optimizer.schedule": "cosine",
    "lora": True,
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.dropout": 0.1,
    "lora.targets": ["q_proj"],
    "lora.quantize": "nf4",
    "compute.dtype": "float32",
    "compute.device": "cpu",
    "compute.attention": "dense",
    "compute.sharing": False,
    "compute.threads": 2,
    "compute.checkpointing": True,
    "compute.compile": True,
    "compute.offload": True,
    "compute.trust_remote_code": True,
    "rollout.reward": "vader",
    "rollout.prompts_per_round": 4,
    "rollout.responses": 3,
    "rollout.max_tokens": 32,
    "rollout.stop_penalty": 1.0,
    "rollout.passes": 2,
    "rollout.minibatches": 2,
    "rollout.renew_reference": 5,
    "policy.clip_low": 0.1,
    "policy.clip_high": 0.28,
    "policy.kl_estimator": "k3",
    "policy.advantages": "dr_grpo",
    "policy.aggregation": "constant",
    "policy.value": "shared",
    "policy.value_coefficient": 0.5,
    "policy.value_clip": None,
    "policy.value_learning_rate": 1e-5,
    "policy.discount": 0.99,
    "policy.trace": 1.0,
    "policy.whiten": False,
    "policy.kl_target": 6.0,
    "policy.kl_stop": 0.02,
    "evaluation.sets": {"easy": ["easy.jsonl"]},
    "evaluation.fraction": 0.1,
    "evaluation.every": 5,
    "evaluation.samples": 0,
    "evaluation.max_new_tokens": 16,
    "evaluation.temperature": 0.7,
    "evaluation.prompt_files": ["p.jsonl"],
    "evaluation.true_reward": "number",
    "checkpoint.every": 20,
    "checkpoint.keep": 5,
    "checkpoint.best": "rewards/accuracies",
    "export.merge": True,
    "preflight.cut": 0.5,
    "preflight.swapped": 0.1,
    "preflight.contradictory": 0.1,
    "preflight.repeated": 0.2,
    "preflight.spans": 0.3,
    "preflight.markers": 0.1,
    "preflight.empty": 0.1,
    "preflight.identical": 0.2,
    "preflight.dropped": 0.3,
    "preflight.similar": 0.2,
    "preflight.edits": 0.1,
    "preflight.improbable": 5.0,
    "preflight.reach": 1e-5,
    "preflight.shortcut": 0.9,
    "watch.moved": 0.4,
    "watch.patience": 32,
    "watch.displaced": 2.0,
    "watch.length": 2.0,
    "watch.repetition": 0.3,
    "watch.stopped": 0.4,
    "watch.solved": 0.9,
    "watch.learned": 3.0,
    "watch.known": 0.8,
    "watch.easy": 0.9,
    "watch.spread": 5.0,
    "watch.flat": 0.02,
    "watch.suspect": 0.9,
    "watch.kl": 20.0,
    "watch.below": 0.2,
}
EVALUATED = {"evaluation.fraction": 0.2}
CONTEXT: dict[str, dict[str, Any]] = {
    "checkpoint.best": EVALUATED,
    "evaluation.every": EVALUATED,
    "evaluation.samples": EVALUATED,
    "evaluation.max_new_tokens": EVALUATED,
    "evaluation.temperature": EVALUATED,
    "evaluation.true_reward": EVALUATED,
    "watch.length": EVALUATED,
    "watch.repetition": EVALUATED,
    "watch.stopped": EVALUATED,
    "watch.known": EVALUATED,
    "watch.easy": EVALUATED,
    "watch.kl": EVALUATED,
    "watch.below": EVALUATED,
    "export.merge": {"lora": True},
    "policy.value_coefficient": {"policy.value": "shared"},
}


def context_of(key: str) -> dict[str, Any]:
    """What a run says beside a key for the key to have a say."""
    reading = objectives_reading(key)
    return CONTEXT.get(key, {}) | ({} if "dpo" in reading else {"objective": reading[0]})


def needed_beside(*given: str) -> dict[str, Any]:
    """What a run cannot do without and `given` does not hold."""
    known = {"data" if key == "data.path" else key for key in given}
    return {key: value for key, value in NEEDED.items() if key not in known}


def run_of(*overrides: str, **values: Any) -> Run:
    return load_run(None, overrides, needed_beside(*values) | values).run


def error_of(*overrides: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(None, overrides, needed_beside(*values) | values)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def error_in(folder: Path, text: str, needed: str = "model: tiny\ndata: a.jsonl\n") -> str:
    """The error of a file that begins with two good lines, with its folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load_run(written(folder, needed + text))
    return str(caught.value).replace(f"{folder}{os.sep}", "")


def reloaded(text: str, folder: Path) -> Run:
    return load_run(written(folder, text)).run


def test_every_key_has_another_value_in_this_file() -> None:
    assert set(OTHER) == set(keys())


def test_sections_are_the_sections_of_run() -> None:
    fields = [name for name in Run.model_fields if name in SECTIONS]
    assert fields == list(SECTIONS)
    for name, section in SECTIONS.items():
        assert isinstance(getattr(Run(model="m", data=Data(path=["d"])), name), section | None)


def test_no_short_name_is_also_the_name_of_something_else() -> None:
    top = {key.name for key in keys().values() if not key.section} | set(SECTIONS)
    assert not top & {key.name for key in keys().values() if key.full != key.name}


@pytest.mark.parametrize("key", keys().values(), ids=lambda key: key.full)
def test_every_key_is_described_in_one_sentence(key: Any) -> None:
    assert key.description.endswith(".")
    assert ". " not in key.description
    assert key.description[0].isupper()


@pytest.mark.parametrize("key", OTHER)
def test_no_accepted_key_is_lost(key: str) -> None:
    context = context_of(key)
    before = load_run(None, values=NEEDED | context)
    by_value = load_run(None, values=needed_beside(key) | context | {key: OTHER[key]})
    by_override = load_run(None, [f"{key}={write(OTHER[key])}"], NEEDED | context)
    assert by_value.run == by_override.run
    assert by_value.run != before.run
    strip = [line.partition("  # ")[0] for line in dump(before).splitlines()]
    assert [line.partition("  # ")[0] for line in dump(by_value).splitlines()] != strip
    if key not in ("lora", "data.path"):
        assert leaf_values(by_value.run)[key] == OTHER[key]
        assert by_value.origins[key] == "python"
        assert by_override.origins[key] == "override"


@pytest.mark.parametrize("key", OTHER)
def test_every_key_works_under_every_flag_name(key: str) -> None:
    flag = next(flag for flag in flags() if flag.key == key)
    context = needed_beside(key) | context_of(key)
    expected = load_run(None, values=context | {key: OTHER[key]}).run
    words = OTHER[key] if isinstance(OTHER[key], list) else [OTHER[key]]
    texts = [word if isinstance(word, str) else write(word) for word in words]
    if key == "lora.targets":
        texts = ["[q_proj]"]
    for name in flag.names:
        typed = name.removeprefix("--")
        given_flags = values_from_flags({typed: texts if flag.many else texts[0], "x": None})
        assert load_run(None, values=context | given_flags, origin_of_values="flag").run == expected


def test_defaults_are_those_of_an_empty_run() -> None:
    run = run_of()
    assert run == Run(model="tiny", data=Data(path=["a.jsonl"]))
    assert (run.loss.beta, run.optimizer.learning_rate, run.lora) == (0.1, None, None)
    assert all(
        origin == "default" or key in ("model", "data.path")
        for key, origin in load_run(None, values=NEEDED).origins.items()
    )


def test_a_run_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        run_of().seed = 3
    with pytest.raises(ValidationError):
        Loss(beta=True)


def test_short_names_nested_names_and_full_names_mean_the_same() -> None:
    expected = run_of("loss.beta=0.2")
    assert run_of("beta=0.2") == run_of("loss={beta: 0.2}") == expected
    assert run_of(beta=0.2) == run_of(loss={"beta": 0.2}) == run_of(loss=Loss(beta=0.2)) == expected
    assert load_run(None, values=NEEDED | {"loss.beta": 0.2}).run == expected


def test_nested_values_are_merged_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nloss: {beta: 0.3, label_smoothing: 0.2}\n")
    loss = load_run(file, values={"loss": {"beta": 0.5}}).run.loss
    assert loss == Loss(beta=0.5, label_smoothing=0.2)


def test_data_may_be_one_file_several_or_a_section() -> None:
    assert run_of("data=b.jsonl").data.path == ["b.jsonl"]
    assert run_of("data=[b.jsonl, c.jsonl]").data.path == ["b.jsonl", "c.jsonl"]
    assert run_of(data=("b.jsonl", Path("c.jsonl"))).data.path == ["b.jsonl", "c.jsonl"]
    assert run_of(data={"path": "b.jsonl", "limit": 3}).data == Data(path=["b.jsonl"], limit=3)
    assert run_of("sets={easy: e.jsonl}").evaluation.sets == {"easy": ["e.jsonl"]}


def test_later_wins_and_origins_say_who_did(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nbeta: 0.2\nseed: 1\nlimit: 5\n")
    resolved = load_run(file, ["seed=3", "seed=4"], {"seed": 2, "limit": 6})
    assert (resolved.run.loss.beta, resolved.run.seed, resolved.run.data.limit) == (0.2, 4, 6)
    assert resolved.origins["loss.beta"] == f"file {file}"
    assert resolved.origins["seed"] == "override"
    assert resolved.origins["data.limit"] == "python"
    assert resolved.origins["epochs"] == "default"


def test_lora_is_switched_by_its_name_or_by_any_of_its_keys() -> None:
    assert run_of("lora=true").lora == run_of(lora={}).lora == Lora()
    assert run_of("lora=false").lora is run_of("lora=null").lora is run_of(lora=None).lora is None
    assert run_of("lora.rank=8").lora == run_of(rank=8).lora == Lora(rank=8, alpha=16.0)
    assert run_of("rank=8", "alpha=3").lora == Lora(rank=8, alpha=3.0)
    assert run_of(lora=Lora(rank=4)).lora == Lora(rank=4, alpha=8.0)


def test_a_later_layer_switches_lora_off_and_on(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nlora: {rank: 8, dropout: 0.5}\n")
    assert load_run(file, ["lora=false"]).run.lora is None
    assert load_run(file, ["lora=true"]).run.lora == Lora(rank=8, dropout=0.5)
    file = written(tmp_path, "model: m\ndata: d\nlora: null\n")
    assert load_run(file, ["rank=8"]).run.lora == Lora(rank=8)


def test_a_later_layer_chooses_between_steps_and_epochs(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nepochs: 3\n")
    run = load_run(file, ["steps=10"]).run
    assert (run.steps, run.epochs) == (10, 1.0)
    file = written(tmp_path, "model: m\ndata: d\nsteps: 10\n")
    run = load_run(file, ["epochs=3"]).run
    assert (run.steps, run.epochs) == (None, 3.0)
    assert run_of("epochs=3", "steps=null").epochs == 3.0


def test_contradictions_in_one_breath_are_refused(tmp_path: Path) -> None:
    assert error_in(tmp_path, "steps: 3\nepochs: 2\n") == (
        "run.yaml:4: epochs and steps in line 3 contradict each other. Keep one of them."
    )
    assert error_of("epochs=2", steps=3) == (
        "epochs and steps contradict each other. Keep one of them."
    )
    assert error_in(tmp_path, "lora: false\nrank: 8\n") == (
        "run.yaml:4: rank and lora in line 3 contradict each other. Keep one of them."
    )
    assert "lora and lora.rank contradict" in error_of("lora.rank=3", "lora=false")


def test_contradictions_between_sections_are_refused(tmp_path: Path) -> None:
    assert error_of("sets={heldout: h.jsonl}", "fraction=0.1") == (
        'sets has a set "heldout", which is what evaluation.fraction makes; give it another name.'
    )
    assert error_of("sets={train: h.jsonl}") == (
        'sets has a set "train", which is what the training rows are called; give it another name.'
    )
    assert run_of("sets={heldout: h.jsonl}").evaluation.sets == {"heldout": ["h.jsonl"]}
    assert error_in(tmp_path, "checkpoint: {best: loss}\n") == (
        "run.yaml:3: checkpoint.best needs an evaluation: give evaluation.sets, "
        "evaluation.fraction or evaluation.prompt_files."
    )
    assert run_of("best=reward", "prompt_files=p.jsonl").checkpoint.best == "reward"
    for objective in ("grpo", "rloo", "online_dpo"):
        assert error_of(f"objective={objective}", "responses=1") == (
            f"responses is 1, and {objective} compares answers: give 2 or more."
        )
    for more, prompts in (([], 16), (["prompts_per_round=4"], 4)):
        assert error_of("objective=ppo", "minibatches=17", *more) == (
            f"minibatches is 17, and rollout.prompts_per_round is {prompts}: a step needs a "
            "prompt. Make them equal, or have fewer minibatches."
        )
    assert run_of("objective=ppo", "minibatches=4", "prompts_per_round=4").rollout.minibatches == 4
    assert run_of("objective=ppo", "responses=1").rollout.responses == 1
    assert error_of("template=none", "template_options={a: 1}") == (
        "template_options has no effect with data.template none; keep one of them."
    )
    assert error_of("template=none", "date=2024-07-05") == (
        "date has no effect with data.template none; keep one of them."
    )
    assert error_of("attention=dense", "sharing=false") == (
        "attention has no effect with compute.sharing false; keep one of them."
    )
    assert run_of("attention=auto", "sharing=false").compute.sharing is False


@pytest.mark.parametrize("command", READS)
@pytest.mark.parametrize("key", OTHER)
def test_a_command_takes_exactly_the_values_that_it_reads(command: str, key: str) -> None:
    # With a reference beta is read; without one, score says so.
    beside = {"reference": "sft"} if (command, key) == ("score", "loss.beta") else {}
    reads = key in READS[command]
    context = {k: v for k, v in context_of(key).items() if not reads or k in READS[command]}
    run = run_of(**{key: OTHER[key]} | context | beside)
    if reads:
        require_read(command, run)
        return
    with pytest.raises(Refusal, match="UW109") as caught:
        require_read(command, run)
    readers = [name for name in READS if key in READS[name]]
    shown = "lora is true" if key.startswith("lora") else f"{key} is "
    (first,) = (line for line in str(caught.value).splitlines() if line.startswith(shown))
    assert all(name in first for name in readers) and f"{command} does not read it" in first


GRPO = ["objective=grpo", "rollout.reward=number"]


@pytest.mark.parametrize(
    ("command", "given", "instead"),
    [
        ("sample", ["max_tokens=5"], "evaluation.max_new_tokens"),
        ("train", ["max_tokens=5", "fraction=0.1"], "evaluation.max_new_tokens"),
        ("train", [*GRPO, "max_new_tokens=5"], "rollout.max_tokens"),
        # What has no effect either is not named.
        ("train", ["max_tokens=5"], None),
        ("score", ["max_tokens=5"], None),
        ("train", ["max_new_tokens=5"], None),
        ("train", [*GRPO, "pairs_per_step=5"], "rollout.prompts_per_round"),
        ("train", ["prompts_per_round=5"], "batch.pairs_per_step"),
        ("train", ["rollout.reward=number", "fraction=0.1"], "evaluation.true_reward"),
        ("train", ["rollout.reward=number"], None),
        ("train", ["value_learning_rate=0.1"], "optimizer.learning_rate"),
    ],
)
def test_a_key_that_is_meant_for_another_place_is_answered_with_its_name_here(
    command: str, given: list[str], instead: str | None
) -> None:
    with pytest.raises(Refusal) as caught:
        require_read(command, run_of(*given))
    (first, _) = str(caught.value).splitlines()
    assert first.endswith(f". Here that is {instead}.") == (instead is not None)
    assert ("Here that" in first) == (instead is not None)


def test_a_value_that_nobody_reads_is_refused_where_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d.jsonl\nobjective: sft\nloss:\n  beta: 0.2\n")
    resolved = load_run(file, ["watch.kl=9"]).with_value("seed", 3, "here")
    with pytest.raises(Refusal) as caught:
        require_read("train", resolved.run, resolved.places)
    first, second, _ = str(caught.value).splitlines()
    assert first.startswith(f"{file}:5: loss.beta is 0.2, and objective sft does not read it")
    assert second.startswith("watch.kl is 9.0, and ")


def test_score_reads_beta_only_with_a_reference() -> None:
    with pytest.raises(Refusal, match="score reads it only with a reference"):
        require_read("score", run_of("beta=0.2"))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["samples=2"], "evaluation.samples is 2, and it has no effect without an evaluation"),
        (["evaluation.every=2"], "evaluation.every is 2, and it has no effect without an eval"),
        (["watch.kl=2"], "watch.kl is 2.0, and it has no effect without an evaluation"),
        (["fraction=.2", "samples=0", "temperature=.5"], "while evaluation.samples is 0"),
        (["fraction=.2", "temperature=0", "watch.kl=9"], "while evaluation.temperature is not 1"),
        (["merge=true"], "export.merge is true, and it has no effect without lora"),
        (["watch.easy=.9"], "watch.easy is 0.9, and it has no effect without an evaluation"),
        (["objective=ppo", "value_coefficient=1"], "has no effect while policy.value is own"),
        (["prompt_files=[p.jsonl]", "samples=0"], "while evaluation.samples is 0"),
        (["objective=sft", "reference=sft"], "sft asks it for answers alone, and no evaluation"),
        (["objective=grpo", "edits=.1"], "objective grpo does not read it: dpo, sft and reward"),
        (["objective=sft", "fraction=.2", "watch.kl=9"], "objective sft does not read it: dpo,"),
        (["objective=grpo", "kl_stop=1", "log_every=2"], "only after a step that is logged"),
        (["objective=grpo", "clip_low=.1"], "clip_low is 0.1, and it has no effect while a round"),
        (["objective=rloo", "clip_high=.28"], "Raise rollout.passes or rollout.minibatches"),
        (["objective=grpo", "kl_stop=1"], "has no effect while a round is one step"),
        (["objective=ppo", "passes=1", "value_clip=null"], "while a round is one step"),
        (["objective=grpo", "beta=0", "kl_estimator=k2"], "has no effect while loss.beta is 0"),
        (["objective=ppo", "beta=0", "kl_estimator=k3"], "has no effect while loss.beta is 0"),
        (["objective=rloo", "beta=0", "renew_reference=2"], "has no effect while loss.beta is 0"),
    ],
)
def test_a_key_that_waits_for_another_is_refused_without_it(said: list[str], why: str) -> None:
    for command in ("train", "check"):
        with pytest.raises(Refusal, match="UW109") as caught:
            require_read(command, run_of(*said))
        assert why in str(caught.value)


def test_a_reference_that_answers_is_read_and_so_are_the_lengths_of_a_reward_models_rows() -> None:
    require_read("train", run_of("objective=sft", "reference=sft", "fraction=.1"))
    require_read("train", run_of("objective=reward", "swapped=.1"))


def test_what_clips_is_read_where_a_round_has_several_steps() -> None:
    clips = ("clip_low=.1", "clip_high=.28", "kl_stop=1")
    require_read("train", run_of("objective=ppo", *clips, "value_clip=1"))
    for more in ("passes=2", "minibatches=2"):
        require_read("train", run_of("objective=grpo", *clips, more))


def test_what_watches_rounds_needs_no_evaluation() -> None:
    watched = ("watch.kl=9", "watch.length=2", "repetition=.3", "stopped=.4")
    require_read("train", run_of("objective=grpo", *watched))
    require_read("train", run_of("objective=grpo", *watched, "fraction=.2", "samples=0"))
    require_read(
        "train", run_of("objective=ppo", *watched, "fraction=.2", "evaluation.temperature=0")
    )


def test_no_samples_may_be_asked_for_without_an_evaluation() -> None:
    require_read("train", run_of("samples=0"))


def test_a_key_that_the_objective_does_not_read_names_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OBJECTIVES, "other", ("preflight.swapped",))
    monkeypatch.setitem(OBJECTIVES, "third", ("loss.beta",))
    run = run_of("beta=0.2", "label_smoothing=0.1", "reference=sft", "swapped=0.3")
    require_read("train", run)
    for command in ("train", "check"):
        with pytest.raises(Refusal) as caught:
            require_read(command, run.model_copy(update={"objective": "other"}))
        assert str(caught.value).splitlines()[:-1] == [
            f"{said}, and objective other does not read it: {readers} do."
            for said, readers in (
                ("reference is sft", "dpo, sft, ppo, grpo, rloo and online_dpo"),
                ("loss.beta is 0.2", "dpo, ppo, grpo, rloo, online_dpo and third"),
                ("loss.label_smoothing is 0.1", "dpo, reward and online_dpo"),
            )
        ]
    assert {"reference", "loss.beta", "policy.trace"} <= set(unread("other"))
    assert not {"preflight.swapped", "seed"} & set(unread("other"))


def test_the_table_of_objectives_has_each_of_them_and_names_keys_or_sections() -> None:
    assert list(OBJECTIVES) == list(keys()["objective"].choices)
    named = {name for own in OBJECTIVES.values() for name in own}
    assert named <= {*keys(), *SECTIONS}
    assert unread("dpo") == [
        *("data.learn", "data.turns", "loss.margin", "loss.centering"),
        *(key.full for key in keys().values() if key.section in ("rollout", "policy")),
        "watch.patience",
    ]


def test_one_key_under_two_names_in_one_place_is_refused(tmp_path: Path) -> None:
    assert error_in(tmp_path, "beta: 0.1\nloss:\n  beta: 0.2\n") == (
        "run.yaml:5: loss.beta sets loss.beta, and so does beta in line 3. Keep one of them."
    )
    assert error_of(beta=0.1, loss={"beta": 0.1}) == (
        "loss.beta sets loss.beta, and so does beta. Keep one of them."
    )


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.5e-6", "5.e-7", ".5e-6", "+5e-7"])
def test_scientific_numbers_are_numbers_everywhere(text: str, tmp_path: Path) -> None:
    expected = float(text)
    file = written(tmp_path, f"model: m\ndata: d\noptimizer:\n  learning_rate: {text}\n")
    assert load_run(file).run.optimizer.learning_rate == expected
    assert run_of(f"learning_rate={text}").optimizer.learning_rate == expected
    from_flag = values_from_flags({"learning_rate": text})
    assert run_of(**from_flag).optimizer.learning_rate == expected


@pytest.mark.parametrize("name", ["1e-5", "007", "2024", "2024-01-31", "12:30", "no", "0x1F", ".5"])
def test_names_that_look_like_something_else_stay_text(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"model: {name}\ndata: [{name}]\nsets: {{{name}: {name}}}\n")
    run = load_run(file).run
    assert (run.model, run.data.path) == (name, [name])
    assert run.evaluation.sets == {name: [name]}
    assert run_of(f"out={name}").out == name


@pytest.mark.parametrize(
    "name", ["*.jsonl", "a #1.jsonl", "a: b", "&x", "!y", "%z", "@q", "- w", "`v"]
)
def test_nothing_is_special_in_an_unquoted_override(name: str) -> None:
    assert run_of(f"out={name}").out == name


def test_quotes_and_brackets_are_yaml_in_an_override() -> None:
    assert run_of('out="a\\tb"').out == "a\tb"
    assert run_of(
        "template_options={a: [1, 1e-5, no, null, true], b: '1'}"
    ).data.template_options == {
        "a": [1, 1e-5, "no", None, True],
        "b": "1",
    }


def test_unknown_keys_name_their_neighbours(tmp_path: Path) -> None:
    assert error_of("loss.betta=1") == (
        'loss.betta is not an option of "dpo", which takes: beta, label_smoothing. '
        "Did you mean beta?"
    )
    assert error_of("loss.betta=1", "objective=grpo") == (
        'loss.betta is not an option of "grpo", which takes: beta. Did you mean beta?'
    )
    assert error_of("loss.betta=1", "objective=sft") == (
        'loss.betta is not an option of "sft", which takes none.'
    )
    assert error_of(betta=1) == "betta is not a key of a run. Did you mean beta?"
    assert error_in(tmp_path, "optimiser: {beta1: 0}\n") == (
        "run.yaml:3: optimiser is not a key of a run. Did you mean optimizer?"
    )
    assert error_in(tmp_path, "export:\n  beta: 1\n") == (
        "run.yaml:4: export.beta is not a key of export, which takes: merge. "
        "Did you mean loss.beta?"
    )
    assert error_of("zzz=1") == (
        "zzz is not a key of a run. The keys are: model, reference, out, objective, epochs, steps, "
        "seed, resume, track, log_every, data, loss, batch, optimizer, lora, compute, rollout, "
        "policy, evaluation, checkpoint, export, preflight, watch."
    )


def test_ambiguous_short_names_list_the_full_ones() -> None:
    expected = "every may be evaluation.every or checkpoint.every: write one of these in full."
    assert error_of("every=3") == expected
    with pytest.raises(ConfigError, match="^--every may be evaluation.every or"):
        load_run(None, values=NEEDED | {"every": 3}, origin_of_values="flag")


WRONG = {
    "loss.beta=-1": "loss.beta must be a number >= 0, found -1.",
    "beta=1e999": "beta must be a number >= 0, found 1e999.",
    "beta=.nan": 'beta must be a number >= 0, found ".nan".',
    "beta=true": "beta must be a number >= 0, found true.",
    "beta=": "beta is given no value. Write beta=null where none is meant, or leave it out.",
    "reference=": (
        "reference is given no value. Write reference=null where none is meant, or leave it out."
    ),
    "beta=null": "beta must be a number >= 0, found null.",
    'beta="0.1"': 'beta must be a number >= 0, found "0.1".',
    "label_smoothing=0.5": "label_smoothing must be a number >= 0 and < 0.5, found 0.5.",
    "steps=1e3": "steps must be a whole number >= 1 or null, found 1e3.",
    "seed=010": 'seed must be a whole number >= 0 and <= 4294967295, found "010".',
    "seed=1_000": 'seed must be a whole number >= 0 and <= 4294967295, found "1_000".',
    "resume=yes": 'resume must be true or false, found "yes".',
    "resume=1": "resume must be true or false, found 1.",
    "model=true": "model must be text, found true.",
    "model=''": 'model must be text, found "".',
    "out={a: 1}": "out must be text or null, found {a: 1}.",
    "dtype=flot32": (
        'dtype must be auto, float32 or bfloat16, found "flot32". Did you mean float32?'
    ),
    "objective=ddpo": (
        "objective must be dpo, sft, reward, ppo, grpo, rloo or online_dpo, "
        'found "ddpo". Did you mean dpo?'
    ),
    "data=[]": "data must be a list of texts (not empty), found [].",
    "track=[wandb, mlfow]": (
        "track must be a list of tensorboard, wandb, mlflow or trackio, found [wandb, mlfow]."
    ),
    "targets=all_linear": (
        "targets must be all-linear or a list of texts (not empty), "
        'found "all_linear". Did you mean all-linear?'
    ),
    "sets=a.jsonl": ('sets must be a mapping {name: text or a list of texts}, found "a.jsonl".'),
    "date=2024-02-30": 'date must be a day such as 2026-11-29 or null, found "2024-02-30".',
    "date=20240705": "date must be a day such as 2026-11-29 or null, found 20240705.",
    "template_options=3": "template_options must be a mapping {name: value}, found 3.",
    "threads=1025": "threads must be a whole number >= 1 and <= 1024 or null, found 1025.",
    "temperature=-0.1": "temperature must be a number >= 0, found -0.1.",
    r'out="a\0b"': r'out must be text or null, found "a\u0000b". Take the NUL character out.',
    r'sets={"a\0b": f}': (
        "sets must be a mapping {name: text or a list of texts}, "
        r'found {"a\u0000b": f}. Take the NUL character out.'
    ),
    "loss=0.1": (
        "loss must be a section with the keys beta, label_smoothing, margin, centering; found 0.1."
    ),
    "lora=yes": (
        "lora must be true, false or a section with the keys rank, alpha, dropout, targets, "
        'quantize; found "yes".'
    ),
    "beta": '"beta" is no override; write key=value, as in beta=0.2.',
    "=3": '"=3" is no override; write key=value, as in beta=0.2.',
    "out=[a": (
        "out:1:3: this is not valid YAML: while parsing a flow sequence, "
        "expected ',' or ']', but got '<stream end>'."
    ),
    "template_options={a: 1, a: 2}": "template_options: a is given twice, first in line 1.",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_say_what_was_found_and_what_is_allowed(override: str) -> None:
    assert error_of(override) == WRONG[override]


def test_wrong_python_values_are_shown_as_python_writes_them() -> None:
    assert error_of(beta={1}) == "beta must be a number >= 0, found {1}."
    assert error_of(template_options={"a": float("inf")}).endswith("found {a: inf}.")
    assert error_of(seed="3" * 100).endswith(f'found "{"3" * 56}....')


def test_flags_are_named_as_they_are_typed() -> None:
    with pytest.raises(ConfigError, match="^--loss.beta must be a number >= 0, found -1.$"):
        values = values_from_flags({"model": "m", "data.path": ["d"], "loss.beta": "-1"})
        load_run(None, values=values, origin_of_values="flag")
    for empty in ("", " ", ["a", ""]):
        with pytest.raises(ConfigError, match="^--reference is given no value. Write --ref"):
            values_from_flags({"reference": empty})
    assert values_from_flags({"reference": '""'}) == {"reference": ""}
    with pytest.raises(ConfigError, match="^--out:1:3: this is not valid YAML"):
        values_from_flags({"out": "[a"})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, required=("out",))
    assert str(caught.value).splitlines() == [
        "model is missing, and needed. The model to align: a hub id, a folder or a .gguf file.",
        "out is missing, and needed. Where results go: a run's folder for train, else a file.",
        "data.path is missing, and needed. Files of preferences: JSON, JSONL, Parquet or CSV.",
    ]
    assert load_run(None, ["out=a"], NEEDED, required=("out",)).run.out == "a"


def test_all_problems_are_reported_at_once_in_the_order_of_the_text(tmp_path: Path) -> None:
    text = "optimizer:\n  beta1: 1.5\n  bta2: 0\nseed: -1\nmodel: b\nmodle: a\n"
    file = written(tmp_path, "data: d\n" + text)
    with pytest.raises(ConfigError) as caught:
        load_run(file, ["keep=0", "x=1"], {"limit": 0}, required=("out",))
    places = [
        line.replace(f"{file}:", "").split(" must ")[0] for line in str(caught.value).split("\n")
    ]
    assert [place.split(" is ")[0] for place in places] == [
        "3: optimizer.beta1",
        "4: optimizer.bta2",
        "5: seed",
        "7: modle",
        "limit",
        "keep",
        "x",
        " out",
    ]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    assert error_in(tmp_path, "seed: 1\nloss:\n  beta: 1\n  beta: 2\nseed: 2\n").splitlines() == [
        "run.yaml:6: loss.beta is given twice, first in line 5.",
        "run.yaml:7: seed is given twice, first in line 3.",
    ]


def test_files_that_are_no_configuration_say_so(tmp_path: Path) -> None:
    assert error_in(tmp_path, "loss: [1\n") == (
        "run.yaml:4:1: this is not valid YAML: while parsing a flow sequence, "
        "expected ',' or ']', but got '<stream end>'."
    )
    assert error_in(tmp_path, "---\na: 1\n").startswith(
        "run.yaml:3:1: this is not valid YAML: expected a single document in the stream"
    )
    assert error_in(tmp_path, "out: &a b\n").startswith(
        "run.yaml:3:6: this is not valid YAML: anch"
    )
    assert error_in(tmp_path, "out: !!float 1\n").startswith("run.yaml:3:6: ")
    assert error_in(tmp_path, "out: *a\n").startswith("run.yaml:3:6: ")
    assert error_in(tmp_path, "out: a\x07\n") == (
        "run.yaml:3: YAML does not allow the character U+0007."
    )
    assert error_in(tmp_path, "[a]: 1\n") == (
        "run.yaml:3: a key must be a single word, found a list or a mapping."
    )
    assert (
        error_in(tmp_path, "[\n" * 5000, needed="")
        == "run.yaml: nested too deeply to be a configuration."
    )
    assert error_in(tmp_path, "- model\n", needed="") == (
        'run.yaml must hold "key: value" lines, found [model].'
    )
    assert error_in(tmp_path, "", needed="").startswith("run.yaml: model is missing")


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    file = written(tmp_path, "")
    with pytest.raises(ConfigError, match=r"runn.yaml does not exist. Did you mean .*run.yaml\?"):
        load_run(tmp_path / "runn.yaml")
    with pytest.raises(ConfigError, match="there is no such file. Without one, say --loss.beta 1"):
        load_run(Path("loss.beta=1"))
    with pytest.raises(ConfigError, match="is a folder; name the run.yaml in it"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        load_run(file / "run.yaml")
    file.write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=r"run.yaml is not UTF-8 text \(byte 8\)"):
        load_run(file)


def test_sections_whose_keys_are_commented_out_say_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, "model: tiny\ndata: a.jsonl\nloss:\n#  beta: 3\n")
    assert load_run(file).run == run_of()


def test_with_value_sets_one_leaf_and_its_origin() -> None:
    first = load_run(None, ["lora=true", "steps=9"], NEEDED)
    later = first.with_value("learning_rate", 1e-5, "resolved")
    assert later.run.optimizer.learning_rate == 1e-5
    assert later.origins == dict(first.origins) | {"optimizer.learning_rate": "resolved"}
    assert later.run.model_copy(update={"optimizer": first.run.optimizer}) == first.run
    assert later.with_value("lora.rank", 4, "resolved").run.lora == Lora(rank=4)
    assert later.with_value("epochs", 2, "resolved").run.steps is None
    with pytest.raises(ConfigError, match="^keep must be a whole number >= 1, found 0.$"):
        first.with_value("keep", 0, "resolved")


def test_dump_gives_every_leaf_with_its_origin() -> None:
    resolved = load_run(None, ["beta=0.2"], NEEDED)
    text = dump(resolved)
    assert "\nloss:\n  beta: 0.2  # override\n  label_smoothing: 0.0  # default\n" in text
    assert text.count("  # ") == len(resolved.origins)
    assert "\nlora: null  # default\n" in text
    assert max(map(len, text.splitlines())) < 80
    beside = dump(resolved, {"compute.device": "here cpu", "stop tokens": "end\nof text"})
    assert "  device: auto  # default; here cpu\n" in beside
    assert beside.endswith("\n\n# stop tokens: end?of text\n")
    odd = Resolved(resolved.run, dict(resolved.origins) | {"seed": "file a\nb"})
    assert "seed: 0  # file a?b\n" in dump(odd)


printed = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(printed, min_size=1, max_size=12) | st.sampled_from(
    ["1e-5", "no", "null", "~", "#", "2024"]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(min_value=1)
random_values = st.fixed_dictionaries(
    {"model": texts, "data.path": st.lists(texts, min_size=1, max_size=3)},
    optional={
        "out": st.none() | texts,
        "steps": st.none() | counts,
        "track": st.lists(st.sampled_from(["wandb", "mlflow"]), max_size=2),
        "resume": st.booleans(),
        "template_options": st.dictionaries(texts, json_values, max_size=3),
        "sets": st.dictionaries(
            texts.filter(lambda name: name != "train"),
            st.lists(texts, min_size=1, max_size=2),
            max_size=2,
        ),
        "date": st.none() | st.dates().map(str),
        "beta": positive,
        "learning_rate": st.none() | positive,
        "warmup": st.floats(min_value=0, max_value=1, exclude_max=True),
        "pairs_per_step": counts,
        "rank": counts.filter(lambda rank: rank < 2**40),
        "alpha": positive,
        "targets": st.just("all-linear") | st.lists(texts, min_size=1, max_size=3),
    },
)


@settings(deadline=None, max_examples=40)
@given(values=random_values)
def test_a_dumped_run_loads_back_to_the_same_run(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    resolved = load_run(None, values=values)
    text = dump(resolved)
    assert reloaded(text, tmp_path_factory.getbasetemp()) == resolved.run
    # The same text means the same to a plain YAML 1.1 reader.
    plain = resolved.run.model_dump()
    if resolved.run.steps is not None:
        del plain["epochs"]
    assert yaml.safe_load(text) == plain


@settings(deadline=None)
@given(value=json_values)
def test_written_values_are_read_back_as_they_were(value: Any) -> None:
    text = write(value)
    assert "\n" not in text
    assert settle(parse(text, "text").value, False) == value


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    for read in (parse, parse_value):
        try:
            read(text, "text")
        except ConfigError as error:
            assert str(error).startswith("text")


@settings(deadline=None)
@given(text=st.text(alphabet="ab:- [{]},\n#'\"&*!?|>", max_size=40))
def test_any_file_is_a_run_or_a_config_error(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ConfigError):
        load_run(written(tmp_path_factory.getbasetemp(), text))


def test_config_imports_no_torch() -> None:
    code = "import sys, upweight.config as c; c.flags(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
