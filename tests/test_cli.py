"""What a user types wrong is one message and exit 2, before the work and not after it."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import upweight as uw
from runs import furnish, plain_rows, train, write_rows
from upweight.cli import _resolve, main
from upweight.config import READS, Resolved
from upweight.config.keys import keys
from upweight.errors import ConfigError, OutputError, Refusal


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


TRAIN = "train --model model --data pairs.jsonl"
SCORE = "score --model model --data pairs.jsonl --dtype float32 --out"
SAMPLE = "sample --model model --prompts pairs.jsonl --out o.jsonl --max_new_tokens 2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{TRAIN} --out o betta=1", "Did you mean beta"),
        ("train --model nowhere/at/all --data pairs.jsonl --out o", "no folder nowhere/at/all"),
        ("train --model model --data missing.jsonl --out o", "missing.jsonl"),
        (TRAIN, "out is missing"),
        (f"{TRAIN} --out o --epochs 1e300", "epochs must be a number > 0 and <= 1000000"),
        (f"{TRAIN} --out o --lora.rank 100000000000", "lora.rank 100,000,000,000 cannot be put on"),
        ("train --model model --data bad.jsonl --out o", "bad.jsonl:1"),
        ("train --model empty --data pairs.jsonl --out o", "no config.json"),
        ("train --model bare --data pairs.jsonl --out o", "tokenizer"),
        (f"{TRAIN} --out model", "model"),
        (
            f"{TRAIN} --out o --threads 99999999999",
            "must be a whole number >= 1 and <= 1024 or null, found 99999999999",
        ),
        (f"{TRAIN} --out '\"a\\0b\"'", "--out must be text or null, found"),
        (f"{TRAIN} --out o --sharing false --attention dense", "has no effect with"),
        (f"{TRAIN} --out {'x' * 300}", "cannot be written: File name too long"),
        (f"{TRAIN} --out o --objective grpo --temperature 0.7", "--temperature would be that of e"),
        (f"{TRAIN} --out o beta = 0.2", '"=" stands alone; write key=value without spaces.'),
        (f"{TRAIN} --out o beta =0.2", '"=0.2" stands alone'),
        (f"{TRAIN} --out o beta= 0.2", '"beta=" stands alone'),
        ("report empty", "no run.yaml"),
        (f"report {'x' * 300}", "is not a run directory"),
        (f"{SCORE} bad.jsonl/x.jsonl", "bad.jsonl/x.jsonl cannot be written"),
        (f"{SCORE} /proc/x/y.jsonl", "/proc/x/y.jsonl cannot be written"),
        (f"{SCORE} empty", "empty is not a file that can be replaced"),
        (f"{SCORE} {'x' * 300}", "cannot be written: File name too long"),
        (f"{SCORE} '\"a\\0b\"'", "Take the NUL character out"),
        (f"{SCORE} o --reference bare", "tokenizer"),
        (f"{SCORE} o --beta 0.3", "score reads it only with a reference"),
        (f"{SAMPLE} -n 0", "num is 0; it must be a whole number >= 1"),
        (f"{SAMPLE} -n -1", "num is -1"),
        (f"{SAMPLE} --top-p 0", "top_p is 0.0; it must be a number > 0 and <= 1"),
        (f"{SAMPLE} --top-p -3", "top_p is -3.0"),
        (f"{SAMPLE} --top-p nan", "top_p is nan"),
        (f"{SAMPLE} --temperature -1", "--temperature must be a number >= 0"),
        (f"{SAMPLE} --max_new_tokens 0", "--max_new_tokens must be a whole number >= 1"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text("{not json\n")
    Path("empty").mkdir()
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes(Path("model", name).read_bytes())
    assert main(shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_what_needs_no_model_is_refused_without_torch() -> None:
    Path("bad.jsonl").write_text("{not json\n")
    Path("same.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n')
    write_rows("odd.jsonl", [{"question": "p", "good": "a"}])
    Path("out").mkdir()
    Path("out/mine").touch()
    words = {
        "--data gone.jsonl": "gone.jsonl does not exist",
        "--data bad.jsonl": "bad.jsonl:1",
        "--data odd.jsonl": "odd.jsonl:1 is of no known layout",
        "--data same.jsonl": "data same.jsonl: none of 1 rows can be used.",
        "--data pairs.jsonl 'evaluation.sets={a: gone.jsonl}'": "gone.jsonl does not exist",
        "--data pairs.jsonl --model none/of/it": "there is no folder none/of/it",
        "--data pairs.jsonl --reference none/of/it": "there is no folder none/of/it",
        "--data pairs.jsonl --out out": "out holds files that are not a run's",
        "--data pairs.jsonl --objective sft --beta 1": "loss.beta is 1.0, and objective sft does",
    }
    script = (
        "import json, sys\n"
        "from upweight.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    for command in ('check', 'train'):\n"
        "        assert main([command, '--model', 'model', '--out', 'new', *words]) == 2\n"
        "        assert 'torch' not in sys.modules, words\n"
    )
    split = [shlex.split(said) for said in words]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(split)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.split("error")[1:]
    for i, said in enumerate(words.values()):
        assert said in lines[2 * i] and lines[2 * i] == lines[2 * i + 1]


def test_rows_are_read_before_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bare").mkdir()
    Path("bare/config.json").write_bytes(Path("model/config.json").read_bytes())
    write_rows("pairs.jsonl", [*plain_rows(200), {"prompt": "p", "chosen": "a"}])
    for command in ("check", "train"):
        assert main(f"{command} --model bare --data pairs.jsonl --out o".split()) == 2
        assert "pairs.jsonl:201" in capsys.readouterr().err


def test_a_command_refuses_what_it_does_not_read_and_names_those_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    idle = "o.jsonl --fraction 0.5 --epochs 7 --lora.rank 3 --temperature 0.5"
    assert main(f"{SCORE} {idle}".split()) == 2
    said = capsys.readouterr().err
    assert "evaluation.fraction is 0.5, and score does not read it: train and check do." in said
    assert "epochs is 7" in said and "lora is true" in said
    assert "temperature is 0.5, and score does not read it: train, check and sample do." in said
    assert not Path("o.jsonl").exists()
    assert main(f"{SAMPLE} --reference nowhere".split()) == 2
    said = capsys.readouterr().err
    assert "reference is nowhere, and sample does not read it: train, check and score do." in said
    with pytest.raises(Refusal, match="lora is true, and score does not read it"):
        uw.score(model="model", data="pairs.jsonl", lora=True)


@pytest.mark.parametrize("words", [f"{SCORE} kept.jsonl", SAMPLE.replace("o.jsonl", "kept.jsonl")])
def test_a_file_that_holds_something_is_replaced_only_where_that_is_asked_for(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("kept.jsonl").write_text("mine\n")
    # Before the model is looked for.
    assert main([*shlex.split(words), "--model", "nowhere/at/all"]) == 2
    shown = capsys.readouterr()
    said = "kept.jsonl exists and holds 5 bytes. Choose another out, or replace it: --overwrite"
    assert said in shown.err and not shown.out
    assert Path("kept.jsonl").read_text() == "mine\n"
    assert main([*shlex.split(words), "--overwrite"]) == 0
    assert "mine" not in Path("kept.jsonl").read_text()
    Path("kept.jsonl").write_text("")
    assert main(shlex.split(words)) == 0
    with pytest.raises(OutputError, match="kept.jsonl exists"):
        uw.sample("model", "pairs.jsonl", out="kept.jsonl", max_new_tokens=2)
    with pytest.raises(OutputError, match="kept.jsonl exists"):
        uw.score(model="model", data="pairs.jsonl", out="kept.jsonl")
    assert uw.score(model="model", data="pairs.jsonl", out="kept.jsonl", overwrite=True)


def test_a_run_and_a_comparison_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    run = "model: model\ndata: pairs.jsonl\n"
    Path("my run.yaml").write_text(run)
    Path("several.yaml").write_text(f"{run}methods:\n  dpo: {{objective: dpo}}\n")
    for command in ("train", "check"):
        assert main([command, "several.yaml", "out=o"]) == 2
        said = "several.yaml:3: methods make this a comparison of several runs. Run: upweight "
        assert f"{said}compare several.yaml" in capsys.readouterr().err
    assert main(["compare", "my run.yaml", "--out", "o"]) == 2
    said = "my run.yaml has no methods, so it is no comparison but a run: upweight train 'my run."
    assert said in capsys.readouterr().err
    assert not Path("o").exists()


def test_a_run_that_is_refused_before_its_first_file_leaves_no_folder() -> None:
    assert main(f"{TRAIN}.missing --out runs/deep/o".split()) == 2
    assert not Path("runs").exists()
    Path("runs/deep").mkdir(parents=True)
    Path("runs/notes.txt").write_text("mine")
    assert main(f"{TRAIN}.missing --out runs/new/o".split()) == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == ["deep", "notes.txt"]
    # A folder that was there before stays.
    assert main(f"{TRAIN}.missing --out runs/deep".split()) == 2
    assert Path("runs/deep").is_dir()


def test_a_terminal_that_lacks_a_letter_shows_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": f"{i} caf\u00e9", "chosen": "\u00e9t\u00e9", "rejected": "b"} for i in range(4)
    ]
    write_rows("pairs.jsonl", rows)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["check", "--model", "model", "--data", "pairs.jsonl"]) == 0
    sys.stdout.flush()
    assert b"\\xe9t\\xe9" in shown.getvalue()


def test_sample_takes_its_rows_from_prompts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{SAMPLE} --dates pairs.jsonl".split()) == 2
    assert "--dates is no argument of upweight sample." in capsys.readouterr().err
    with pytest.raises(ConfigError, match="data.path"):
        uw.sample("model", "pairs.jsonl", data="other.jsonl")


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--modle", "model", "--data", "pairs.jsonl", "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert "--modle is no argument of upweight train. Did you mean --model?" in said
    assert "Traceback" not in said and not Path("o").exists()


@pytest.mark.parametrize(
    "words",
    [
        "run.yaml steps=2 --out o --data a.jsonl b.jsonl beta=0.3",
        "--data a.jsonl beta=0.3 --data b.jsonl steps=2 --out o run.yaml",
        "steps=2 --data a.jsonl --out o run.yaml --data.path b.jsonl beta=0.3",
        "run.yaml --data a.jsonl b.jsonl beta=0.1 out=p --resume beta=0.3 --seed 1 out=o steps=2",
    ],
)
def test_words_that_change_keys_may_stand_anywhere_and_files_add_up(
    words: str, monkeypatch: pytest.MonkeyPatch
):
    Path("run.yaml").write_text("model: m\n")
    asked: list[Resolved] = []
    monkeypatch.setattr("upweight.cli._train", lambda given: asked.extend(_resolve(given)) or 0)
    assert main(["train", *words.split()]) == 0
    run = asked[0].run
    assert ([*run.data.path], run.out) == (["a.jsonl", "b.jsonl"], "o")
    assert (run.steps, run.loss.beta, run.model) == (2, 0.3, "m")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("check --model m --data a.jsonl learning_rte=1", "learning_rte is not a key of a run"),
        ("check --model m --data year=2024.jsonl", "year=2024.jsonl does not exist"),
        (
            "sample --model m --prompts p --data p --out o",
            "upweight sample. Here that is --prompts.",
        ),
        ("compare none.yaml", "none.yaml cannot be read: No such file or directory."),
        ("check --model ./modell", "model: there is no folder ./modell. Did you mean"),
        ("report .", "has a run.yaml and none of account.json, environment.json, metrics.jsonl"),
        ("compare c.yaml steps=2", "steps=2 is no argument of upweight compare: write keys in"),
    ],
)
def test_words_that_cannot_be_meant_are_told_why(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
):
    Path("run.yaml").touch()
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_the_result_of_check_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model", "model", "--data", "pairs.jsonl", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "preferences" in out and "float32" in out and not err


def test_the_demo_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    assert main(["demo"]) == 2
    assert "Run: pip install vaderSentiment" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", READS)
def test_help_shows_the_keys_that_a_command_reads(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for key in keys():
        read = key in READS[command] and (command, key) != ("sample", "data.path")
        assert (f"--{key} " in shown or f"--{key}," in shown) == read, key


@pytest.mark.parametrize("out", ["lr=1e-5", "with a space", "a/b=c d"])
def test_the_command_that_is_printed_goes_on_wherever_the_run_lies(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(out, "--steps", "1") == 0
    assert main(["train", f"{out}/run.yaml", "resume=true", "beta=0.3"]) == 2
    said = capsys.readouterr().err
    printed = said.partition("Go on with its own:  ")[2].partition("  (free")[0]
    assert shlex.split(printed) == ["upweight", "train", f"{out}/run.yaml", "resume=true"]
    assert main(shlex.split(printed)[1:]) == 0
