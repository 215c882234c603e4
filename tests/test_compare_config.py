"""compare.yaml, before any of its methods begins."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import pytest

from upweight.config.methods import load_comparison
from upweight.errors import ConfigError
from upweight.recipes.alike import require_judged

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


def test_the_folder_is_the_one_that_the_file_names(tmp_path: Path):
    named = comparison(tmp_path, "out: runs/film\nmethods:\n  dpo: {}\n")
    assert named.out == "runs/film"
    # It is no setting of the methods, of which the page says what they were told.
    assert "out" not in [setting.leaf for setting in named.shared]
    assert named.run_of(named.methods[0], Path("elsewhere")).run.out == "elsewhere/dpo"
    assert comparison(tmp_path, "out: null\nmethods:\n  dpo: {}\n").out is None
    assert comparison(tmp_path, "methods:\n  dpo: {}\n").out is None


def test_what_is_shared_and_best_of_n_does_not_read_is_none_of_its_concern(tmp_path: Path):
    made = runs(
        tmp_path,
        "responses: 4\nlora: {rank: 4, quantize: nf4}\nlearning_rate: 3\nmethods:\n"
        "  grpo: {objective: grpo, reward: vader}\n"
        "  best: {objective: best_of_n, reward: vader, lora: {quantize: nf4}}\n",
    )
    best, grpo = made["best"], made["grpo"]
    assert grpo.rollout.responses == 4 and best.rollout.responses is None
    assert best.optimizer.learning_rate is None and grpo.optimizer.learning_rate == 3
    assert best.lora is not None and best.lora.quantize == "nf4" and best.lora.rank != 4


def test_every_method_of_the_embedded_comparison_has_the_settings_that_it_reads(tmp_path: Path):
    given = {"model": "base", "data.path": ["pairs.jsonl"], "data.max_length": 256,
             "evaluation.sets": {"heldout": ["heldout.jsonl"]},
             "evaluation.prompt_files": ["heldout.jsonl"]}  # fmt: skip
    with as_file(files("upweight.demo") / "compare.yaml") as file:
        found = load_comparison(file, given)
    made = {method.name: found.run_of(method, tmp_path) for method in found.methods}
    for method in found.methods:
        method.require_read(made[method.name])
    assert require_judged(made) == "vader"
    assert {m.objective for m in found.methods} == {
        "sft", "dpo", "reward", "ppo", "grpo", "best_of_n"
    }  # fmt: skip
    judge = str(tmp_path / "reward-model" / "model")
    assert {r.run.rollout.reward for r in made.values()} == {None, judge}


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
        (
            "methods:\n  judge: {objective: reward}\n"
            "  b: {objective: best_of_n, reward: 'method:judge'}\n",
            "compare.yaml:5: a comparison needs a method that is trained and answers prompts: what "
            "all start from is measured before its first step. best_of_n trains nothing, and rew",
        ),
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
        (
            "methods:\n  dpo: {out: here}\n",
            "compare.yaml:6: method dpo: out stands beside the methods: each writes to a folder in",
        ),
        (
            "methods:\n  dpo: {resume: true}\n",
            "compare.yaml:6: method dpo: resume is not read by compare, which goes on with what "
            "has not finished when it is run again. Leave it out.",
        ),
        ("resume: true\nmethods:\n  dpo: {}\n", "compare.yaml:5: resume is not read by compare"),
        ("out: [a]\nmethods:\n  dpo: {}\n", "compare.yaml:5: out must be text or null, found [a]."),
        (
            "responses: 8\nmethods:\n  dpo: {}\n  b: {objective: best_of_n, reward: vader}\n",
            "responses is read by none of the methods (dpo, best_of_n)",
        ),
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
