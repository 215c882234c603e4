"""Who reads what: a key that a command, an objective or another key passes over is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import OTHER, context_of, error_in, error_of, run_of
from upweight.config import OBJECTIVES, READS, load_run, require_read, unread
from upweight.config.keys import keys
from upweight.config.sections import SECTIONS
from upweight.errors import Refusal


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
        # The value model's own rate is ten times the policy's: another thing.
        ("train", ["value_learning_rate=0.1"], None),
    ],
)
def test_a_key_that_is_meant_for_another_place_is_answered_with_its_name_here(
    command: str, given: list[str], instead: str | None
) -> None:
    with pytest.raises(Refusal) as caught:
        require_read(command, run_of(*given))
    (first, _) = str(caught.value).splitlines()
    assert (f". Here that is {instead}: " in first) == (instead is not None)
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
