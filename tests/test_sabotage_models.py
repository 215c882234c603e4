"""Each failure of reference and export is planted in a run, and answered by its code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

import upweight.recipes.reference as recipe
import upweight.training.objectives as objectives
from runs import PAIRS, furnish, rows_of, train, write_rows
from tiny import CHATML, byte_tokenizer, save_tiny, tiny_model
from upweight.cli import main
from upweight.config import load_run
from upweight.data.render import make_renderer
from upweight.errors import Refusal
from upweight.models.load import fingerprint
from upweight.models.probes import require_same_rendering
from upweight.models.reference import SCHEMA
from upweight.recipes.prepare import load_policy, prepare
from upweight.recipes.screen import Silent
from upweight.recipes.start import trained
from upweight.recipes.train import train_model
from upweight.types import Example, RowId

TOOLS = ({"type": "function", "function": {"name": "look_up"}},)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def test_log_probs_summed_in_half_precision_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = objectives.token_logps
    monkeypatch.setattr(objectives, "token_logps", lambda lm, forest: real(lm, forest).bfloat16())
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW105]" in said and "are in bfloat16" in said and "Rows: pairs.jsonl:" in said
    (last,) = [row for row in rows_of("run/metrics.jsonl") if row["kind"] == "warning"]
    assert (last["code"], last["step"], last["refused"]) == ("UW105", 1, True)
    assert "UW105" in Path("run/report.html").read_text()


def shift(values: list[list[float]]) -> list[list[float]]:
    """Each row's log-probs under its neighbour's key."""
    same = [i for i, v in enumerate(values) if len(v) == len(values[0])]
    turned = dict(zip(same, same[1:] + same[:1], strict=True))
    return [values[turned.get(i, i)] for i in range(len(values))]


def spoil_cache(spoil: Callable[[list[list[float]]], list[list[float]]]) -> None:
    for part in Path("cache").rglob("part-*.parquet"):
        table = pq.read_table(part, schema=SCHEMA)
        values = spoil(table["logps"].to_pylist())
        logps = pa.array(values, SCHEMA.field("logps").type)
        pq.write_table(table.set_column(1, SCHEMA.field("logps"), logps), part)


@pytest.mark.parametrize("spoil", [shift, lambda values: [[x + 0.5 for x in v] for v in values]])
def test_reference_log_probs_that_are_of_other_rows_are_refused(
    spoil: Callable[[list[list[float]]], list[list[float]]], capsys: pytest.CaptureFixture[str]
):
    assert train("first") == 0
    spoil_cache(spoil)
    assert train("second") == 2
    said = capsys.readouterr().err
    assert "error[UW107]" in said and "pairs.jsonl:" in said and "Delete that folder" in said


def test_a_few_spoiled_rows_among_many_fresh_ones_are_refused(capsys: pytest.CaptureFixture[str]):
    write_rows("pairs.jsonl", PAIRS[:3])
    assert train("first") == 0
    spoil_cache(lambda values: [[x + 5 for x in v] for v in values])
    fresh = [{**row, "prompt": f"another {i}"} for i, row in enumerate(PAIRS * 3)]
    write_rows("pairs.jsonl", [*fresh, *PAIRS[:3]])
    assert train("second") == 2
    assert "error[UW107]" in capsys.readouterr().err


class Changing(Silent):
    """Puts another model where the reference lies, as soon as a training record is shown."""

    def record(self, record: Any, total_steps: int) -> None:
        if record["kind"] == "train":
            save_tiny("start", seed=5)


def test_a_reference_that_changes_on_disk_is_refused_at_the_next_evaluation():
    save_tiny("start")
    values = {
        "model": "model", "reference": "start", "data": "pairs.jsonl", "out": "run",
        "pairs_per_step": 4, "evaluation.every": 1, "evaluation.fraction": 0.2,
    }  # fmt: skip
    with pytest.raises(Refusal, match="the reference start is not what it was") as refused:
        train_model(load_run(None, values=values), Changing())
    assert refused.value.code == "UW108"


def test_a_frozen_base_is_hashed_once_and_again_when_a_bit_of_it_changes(
    monkeypatch: pytest.MonkeyPatch,
):
    values = {"model": "model", "data": "pairs.jsonl", "lora.rank": 2, "evaluation.samples": 0}
    run = load_run(None, values=values).run
    lm = load_policy(run)
    prepared, hashed = prepare(run, lm), []
    lm = trained(run, lm, prepared.renderer.stop_ids)
    monkeypatch.setattr(recipe, "fingerprint", lambda lm: hashed.append(lm) or fingerprint(lm))
    against = recipe.ask_reference(run, lm, prepared, Silent())
    hashed.clear()
    for name, parameter in lm.model.named_parameters():
        if "lora_" in name:
            parameter.data += 1.0  # the policy's own to change
    with recipe.same_reference(run, lm, against):
        assert not hashed
    lm.causal.get_input_embeddings().weight.data.view(torch.int32)[5, 7] += 1
    with pytest.raises(Refusal, match="UW108"), recipe.same_reference(run, lm, against):
        raise AssertionError("not reached")
    assert len(hashed) == 1


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_gap_of_scores_is_refused_where_rows_that_have_them_state_their_preferences(
    command: str, capsys: pytest.CaptureFixture[str]
):
    answers = [{"text": "good", "score": 1.0}, {"text": "bad", "score": 0.9}]
    row = {"responses": answers, "preferences": [[1, 0]]}
    write_rows("stated.jsonl", [{"prompt": f"question {i}", **row} for i in range(6)])
    words = [command, "--model", "model", "--data", "stated.jsonl", "--min_score_gap", "0.5"]
    assert main([*words, *(["--out", "run"] if command == "train" else [])]) == 2
    assert "rows that have scores state their preferences too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--merge"], "export.merge is true, and it has no effect without lora"),
        (
            ["--fraction", "0", "--evaluation.every", "3"],
            "evaluation.every is 3, and it has no effect",
        ),
        (["--pairing", "extremes"], "data.pairing is extremes, and no row has scores"),
        (["--min_score_gap", "1"], "data.min_score_gap is 1.0, and no row has scores"),
        (["--template_options", "{thinking: 1}"], "the model's chat template does not read it"),
        (
            ["--model", "plain", "--template_options", "{a: 1}"],
            "text without a chat template can",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_an_option_that_does_nothing_is_refused(
    command: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    save_tiny("plain")
    Path("plain/chat_template.jinja").unlink()
    assert train("run", *more, command=command) == 2
    error = capsys.readouterr().err
    assert "error[UW109]" in error and said in error and not Path("run/model").exists()


def with_an_added_token(tied: bool) -> None:
    """model/ with a token of its own between the turns, at the end of embedding and head."""
    model = tiny_model("qwen2")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    tokenizer = byte_tokenizer(CHATML.replace("<|im_start|>", "<|turn|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    model.resize_token_embeddings(len(tokenizer) + 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:].normal_(0, 0.3)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")


def losing(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[..., None]:
    """save_pretrained that writes something else than the model has."""
    save = PreTrainedModel.save_pretrained

    def spoiled(self: PreTrainedModel, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return spoiled


def without_the_added_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][-2] = 0


@pytest.mark.parametrize("more", [(), ("--lora", "true"), ("--lora", "true", "--merge")])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_an_added_token_is_exported_whole(
    tied: bool, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    with_an_added_token(tied)
    assert train("run", *more) == 0
    probes = json.loads(Path("run/model/probes.json").read_text())["probes"]
    added = AutoTokenizer.from_pretrained("run/model").convert_tokens_to_ids("<|turn|>")
    assert probes and all(added in probe["prompt_ids"] for probe in probes)
    assert main(["check", "--model", "run/model"]) == 0
    if "--merge" in more:
        assert main(["check", "--model", "run/adapter"]) == 0
    assert "probes have the same tokens" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_an_added_token_that_the_export_loses_is_refused_and_resuming_exports_it(
    tied: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with_an_added_token(tied)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", losing(without_the_added_row))
        assert train("run") == 2
    assert "error[UW401]: the export is not the trained model" in capsys.readouterr().err
    assert not Path("run/model").exists()
    assert main(["train", "run/run.yaml", "resume=true"]) == 0
    assert Path("run/model/probes.json").is_file()


def other_template(self: Tokenizer, folder: Path, **options: Any) -> None:
    (Path(folder) / "chat_template.jinja").write_text(CHATML.replace("\n", " \n"))


def no_template(self: Tokenizer, folder: Path, **options: Any) -> None:
    (Path(folder) / "chat_template.jinja").unlink()


def other_ids(self: Tokenizer, folder: Path, **options: Any) -> None:
    file = Path(folder) / "tokenizer.json"
    written = json.loads(file.read_text())
    vocab = written["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_template, "token "),
        (no_template, "the tokenizer has no chat template"),
        (other_ids, "in training"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--lora", "true", "--merge")])
def test_an_export_that_writes_other_tokens_is_refused(
    more: tuple[str, ...],
    spoil: Callable[..., None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    save = Tokenizer.save_pretrained

    def spoiled(self: Tokenizer, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        spoil(self, folder, **options)

    monkeypatch.setattr(Tokenizer, "save_pretrained", spoiled)
    assert train("run", *more) == 2
    error = capsys.readouterr().err
    assert "error[UW402]: the export writes other tokens than training did" in error
    assert said in error and not Path("run/model").exists()


def test_a_model_is_checked_against_the_probes_that_came_with_it(
    capsys: pytest.CaptureFixture[str],
):
    assert train("run") == 0
    assert main(["check", "--model", "run/model"]) == 0
    said = capsys.readouterr().out
    assert main(["check", "--model", "run/model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["largest_difference"] < 1e-4 and found["probes"] == 3
    assert (found["allowed"], found["doubt"]) == (0.002, None)
    assert "3 probes have the same tokens" in said and "(rounding of its weights: 0.002)" in said
    _half("run/model", "half")
    assert main(["check", "--model", "half"]) == 0
    assert "(rounding of its weights: 0.3)" in capsys.readouterr().out
    file = Path("run/model/model.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 1.05
    save_file(tensors, file, {"format": "pt"})
    assert main(["check", "--model", "run/model"]) == 2
    assert "error[UW401]: run/model is not the model that was exp" in capsys.readouterr().err
    Path("half/chat_template.jinja").write_text("You are a bird. " + CHATML)
    assert main(["check", "--model", "half"]) == 2
    error = capsys.readouterr().err
    assert "error[UW402]: half writes other tokens" in error and "token 1 of probes.json:1" in error


def test_prompts_of_rounds_are_rendered_again_too():
    """What only rows have, such as tools, is in none of the probes' conversations."""
    rows = [Example(({"role": "user", "content": f"q {i}"},), (), (), RowId("p", i), tools=TOOLS)
            for i in range(3)]  # fmt: skip
    with_tools = "{% if tools %}<tools>{% endif %}" + CHATML
    renderer, same = (make_renderer(byte_tokenizer(with_tools)) for _ in range(2))
    require_same_rendering("it", same.tokenizer, renderer, rows)
    for other in (CHATML, "{% if tools %}{{ raise_exception('no') }}{% endif %}" + CHATML):
        with pytest.raises(Refusal, match="UW402") as caught:
            require_same_rendering("it", byte_tokenizer(other), renderer, rows)
        assert "p:0" in str(caught.value)


def test_a_template_that_opens_a_thought_has_probes_and_is_gone_on_with():
    opened = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
    byte_tokenizer(opened).save_pretrained("model")
    thought = "<think>\nso\n</think>\n"
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}],
             "completion": [{"role": "assistant", "content": thought + row["chosen"]}]}
            for row in PAIRS]  # fmt: skip
    write_rows("thought.jsonl", rows)
    sft = ("--objective", "sft", "--data", "thought.jsonl", "--steps", "1")
    assert train("run", *sft) == 0
    record = json.loads(Path("run/model/probes.json").read_text())
    assert len(record["probes"]) == 3 and main(["check", "--model", "run/model"]) == 0
    assert train("second", *sft, "--model", "run/model") == 0
    # A template may take none of the conversations: then there is nothing to compare.
    record["probes"] = []
    Path("run/model/probes.json").write_text(json.dumps(record))
    assert train("third", *sft, "--model", "run/model") == 0


def _half(folder: str, to: str, probes: Path | None = None) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    Path(to, "probes.json").write_bytes((probes or Path(folder, "probes.json")).read_bytes())


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_that_is_the_start_of_its_training_is_refused_though_rounding_would_explain_it(
    lora: bool, capsys: pytest.CaptureFixture[str]
):
    # Weights that bfloat16 holds: what is learned at a small rate is rounded back to them.
    tiny_model().to(torch.bfloat16).float().save_pretrained("model")
    merged = ["--lora", "--export.merge"] if lora else []
    assert train("run", "--learning-rate", "1e-4", *merged) == 0
    assert main(["check", "--model", "run/model"]) == 0
    assert "nearer to" not in capsys.readouterr().out
    file = Path("run/model/probes.json")
    _half("model", "half", file)
    assert main(["check", "--model", "half"]) == 2
    said = capsys.readouterr().err
    assert "error[UW401]: half is nearer to the model that training began with (" in said
    assert "what was learned is not in it" in said
    # Nor is it gone on with.
    assert train("second", "--model", "half", command="check") == 2
    assert "error[UW401]: half is nearer to the model" in capsys.readouterr().err
    # Probes that were written without the start's numbers say what they said.
    record = json.loads(file.read_text())
    for probe in record["probes"]:
        del probe["start_logps"]
    Path("half/probes.json").write_text(json.dumps(record))
    assert main(["check", "--model", "half"]) == 0


@pytest.mark.parametrize(("share", "warned"), [(0.45, True), (0.55, False)])
def test_a_copy_that_has_lost_most_of_what_was_learned_is_reported(
    share: float, warned: bool, capsys: pytest.CaptureFixture[str]
):
    assert train("run", "--learning-rate", "1e-4") == 0
    start, trained = (load_file(f"{of}/model.safetensors") for of in ("model", "run/model"))
    _half("run/model", "half")
    between = {key: start[key] + share * (trained[key] - start[key]) for key in trained}
    save_file(between, "half/model.safetensors", {"format": "pt"})
    config = json.loads(Path("half/config.json").read_text())
    # As if it had been rounded, which explains more than this.
    Path("half/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    capsys.readouterr()
    assert main(["check", "--model", "half"]) == 0
    said = "its rounding is as large as what was learned"
    assert (said in capsys.readouterr().out) == warned


def test_a_run_that_changes_nothing_measurable_has_no_start_among_its_probes():
    assert train("run", "--learning-rate", "1e-12") == 0
    record = json.loads(Path("run/model/probes.json").read_text())
    assert all(probe["start_logps"] == [] for probe in record["probes"])
    assert train("more") == 0
    record = json.loads(Path("more/model/probes.json").read_text())
    moved = [abs(x - y) for p in record["probes"]
             for x, y in zip(p["logps"], p["start_logps"], strict=True)]  # fmt: skip
    assert max(moved) > 0.002


def no_probe(record: dict[str, Any]) -> None:
    record["probes"].clear()


def one_logp_less(record: dict[str, Any]) -> None:
    record["probes"][1]["logps"].pop()


def a_token_of_another_model(record: dict[str, Any]) -> None:
    record["probes"][0]["response_ids"][0] = 99_999


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_probe, "probes.json holds no probe, so there is nothing to compare"),
        (one_logp_less, "probe 2 has 6 logps and 0 start_logps for 7 response_ids"),
        (a_token_of_another_model, "has the token id 99,999, and model has 260 tokens"),
    ],
)
def test_probes_that_cannot_be_compared_are_a_message(
    spoil: Callable[[dict[str, Any]], None], said: str, capsys: pytest.CaptureFixture[str]
):
    probe = {"messages": [{"role": "user", "content": "Name a bird."}], "prompt_ids": [5, 6],
             "response_ids": [*range(7)], "logps": [-1.0] * 7}  # fmt: skip
    record: dict[str, Any] = {"template": "chat", "template_options": {}, "stop_token_ids": [2]}
    record["probes"] = [copy.deepcopy(probe) for _ in range(2)]
    spoil(record)
    Path("model/probes.json").write_text(json.dumps(record))
    assert main(["check", "--model", "model"]) == 2
    assert said in capsys.readouterr().err


def test_no_row_of_the_data_is_among_the_probes():
    assert train("run") == 0
    written = Path("run/model/probes.json").read_text()
    assert "Name a bird." in written and "question" not in written and "fine" not in written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model model", "model/probes.json does not exist: without data, check compares a model"),
        ("--model spoiled", "spoiled/probes.json is not what an export writes (KeyError"),
        ("--model model --beta 0.2", "--loss.beta has no effect without data"),
    ],
)
def test_a_model_without_probes_says_what_is_missing(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
):
    save_tiny("spoiled")
    Path("spoiled/probes.json").write_text("{}")
    assert main(["check", *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_what_a_server_must_be_told_is_said_at_the_end(capsys: pytest.CaptureFixture[str]):
    byte_tokenizer("{{ style }}" + CHATML).save_pretrained("model")
    assert train("run", "--template_options", "{style: curt}") == 0
    assert 'requests must set chat_template_kwargs to {"style": "curt"}' in capsys.readouterr().err
    own = [{**row, "template_options": {"style": "long"}} for row in rows_of("pairs.jsonl")]
    write_rows("own.jsonl", own[:4] + rows_of("pairs.jsonl")[4:])
    assert train("own", "--data", "own.jsonl") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert 'rows set template options of their own (such as own.jsonl:1: {"style": "long"})' in said
    assert train("text", "--template", "none") == 0
    assert "serve it with completions of text" in capsys.readouterr().err
    assert train("plain", "--template_options", "{style: ''}") == 0
    said = capsys.readouterr().err
    assert "requests must" not in said and "completions of text" not in said


def moved(folder: str, name: str = "lm_head.weight", by: float = 1.05) -> None:
    """The weights in a folder, one matrix of them larger."""
    file = Path(folder, "model.safetensors")
    tensors = load_file(file)
    tensors[name] *= by
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("key", ["--model", "--reference"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_start_or_reference_that_is_not_what_was_exported_is_refused(
    lora: bool, key: str, command: str, capsys: pytest.CaptureFixture[str]
):
    assert train("first", *(["--lora"] if lora else [])) == 0
    before = "first/adapter" if Path("first/adapter").is_dir() else "first/model"
    assert train("second", key, before, command=command) == 0
    # Of an adapter it is the base that was trained on or replaced.
    moved("model" if lora else "first/model")
    capsys.readouterr()
    assert train("third", key, before, command=command) == 2
    said = capsys.readouterr().err
    assert f"error[UW401]: {before} is not the model that was exported" in said
    assert f"remove {before}/probes.json if it was changed on purpose" in said
    Path(before, "probes.json").unlink()
    assert train("fourth", key, before, command=command) == 0


def test_a_start_whose_template_is_another_than_at_its_export_is_refused(
    capsys: pytest.CaptureFixture[str],
):
    assert train("first") == 0
    Path("first/model/chat_template.jinja").write_text("You are a bird. " + CHATML)
    assert train("second", "--model", "first/model", command="check") == 2
    assert "error[UW402]: first/model writes other tokens" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--lora", "true")])
def test_an_exported_reward_model_that_scores_otherwise_is_refused(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save = PreTrainedModel.save_pretrained

    def spoiled(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        moved(str(folder), "score.weight", 1.5)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    words = "train --model model --data pairs.jsonl --objective reward --out run --dtype float32"
    assert main([*words.split(), "--learning-rate", "3e-2", "--fraction", "0", *more]) == 2
    error = capsys.readouterr().err
    assert "error[UW401]: the export is not the trained reward model: read back, it" in error
    assert not Path("run/model").exists()
