"""compare.yaml, before any of its methods begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from upweight.config.methods import load_comparison
from upweight.errors import ConfigError

SHARED = """
model: base
data: pairs.jsonl
evaluation: {true_reward: vader, prompt_files: prompts.jsonl, samples: 4}
"""


def comparison(tmp_path: Path, text: str, **given: object):
    file = tmp_path / "compare.yaml"
    file.write_text(SHARED + text)
    return load_comparison(file, given)


def runs(tmp_path: Path, text: str, **given: object):
    found = comparison(tmp_path, text, **given)
    return {m.name: found.run_of(m, Path("out")).run for m in found.methods}


def test_a_method_is_what_is_shared_with_its_own_keys_laid_over(tmp_path: Path):
    made = runs(
        tmp_path,
        "lora: {rank: 4}\nepochs: 2\nbeta: 0.3\nmethods:\n"
        "  dpo: {}\n  whole: {lora: false, steps: 7, loss.beta: 0.5}\n  sft: {objective: sft}\n",
    )
    assert made["dpo"].lora is not None and made["dpo"].lora.rank == 4
    assert made["dpo"].epochs == 2 and made["dpo"].loss.beta == 0.3
    assert made["whole"].lora is None
    assert made["whole"].steps == 7 and made["whole"].loss.beta == 0.5
    # What is shared, and sft does not read, is none of its concern.
    assert made["sft"].objective == "sft"
    assert made["sft"].out == "out/sft"


def test_a_shared_objective_is_that_of_methods_that_name_none(tmp_path: Path):
    found = comparison(tmp_path, "objective: sft\nmethods:\n  a: {steps: 2}\n  b: {steps: 3}\n")
    assert [m.objective for m in found.methods] == ["sft", "sft"]
    assert found.run_of(found.methods[0], Path("out")).run.objective == "sft"


def test_the_reward_of_a_method_is_the_model_that_another_trains(tmp_path: Path):
    text = (
        "methods:\n  The Judge!: {objective: reward}\n"
        "  ppo: {objective: ppo, rollout: {reward: 'method:The Judge!'}}\n"
        "  best: {objective: best_of_n, reward: 'method:The Judge!', num: 3}\n"
    )
    made = runs(tmp_path, text)
    assert made["ppo"].rollout.reward == made["best"].rollout.reward == "out/the-judge/model"
    assert comparison(tmp_path, text).methods[2].num == 3


def test_what_is_given_is_laid_over_what_is_shared(tmp_path: Path):
    assert runs(tmp_path, "methods:\n  dpo: {}\n", model="other")["dpo"].model == "other"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x\n", "has no methods"),
        ("methods:\n  dpo: 3\n", "compare.yaml:6: method dpo is 3; allowed: the keys of a run"),
        ("methods:\n  b: {objective: best_of_n, reward: vader, num: abc}\n", 'num is "abc"'),
        ("methods:\n  b: {objective: best_of_n, reward: vader, num: 0}\n", "from 1 on"),
        ("methods:\n  b: {objective: best_of_n}\n", "method b needs reward"),
        ("methods:\n  dpo: {num: 3}\n", "num is read by best_of_n alone"),
        ("methods:\n  dpo: {objective: dop}\n", "objective is dop; allowed: dpo"),
        ("methods:\n  a b: {}\n  A-B: {}\n", "would both be written to a-b"),
        ("methods:\n  '!!': {}\n", "needs a letter or a digit in its name"),
        ("discount: 0.9\nmethods:\n  dpo: {}\n", "discount is read by none of the methods (dpo)"),
        (
            "methods:\n  judge: {objective: reward}\n"
            "  ppo: {objective: ppo, reward: 'method:judg'}\n",
            "no reward model before it is called so (before it: judge). Did you mean judge?",
        ),
        ("methods:\n  ppo: {objective: ppo, reward: 'method:dpo'}\n  dpo: {}\n", "before it: none"),
    ],
)
def test_what_is_wrong_in_the_file_is_told(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError) as raised:
        comparison(tmp_path, text)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            "betta: 0.3",
            "compare.yaml:6: method dpo: betta is not a key of a run. Did you mean beta",
        ),
        ("beta: high", "method dpo: beta must be"),
    ],
)
def test_a_key_of_a_method_that_is_wrong_is_told_with_its_line(tmp_path: Path, own: str, said: str):
    found = comparison(tmp_path, f"methods:\n  dpo: {{{own}}}\n")
    with pytest.raises(ConfigError) as raised:
        found.run_of(found.methods[0], Path("out"))
    assert said in str(raised.value)
