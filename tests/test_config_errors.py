"""What is wrong in a configuration is said with its place, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import NEEDED, error_in, error_of, written
from upweight.config import load_run, values_from_flags
from upweight.errors import ConfigError


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
    "fraction=30": (
        "fraction must be a number >= 0 and < 1, found 30. It is a share of the prompts: 30 % is "
        "0.3."
    ),
    "warmup=100": "warmup must be a number >= 0 and < 1, found 100.",
    "fraction=-1": "fraction must be a number >= 0 and < 1, found -1.",
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
