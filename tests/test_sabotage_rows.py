"""Each failure that rows, reference or packing bring with them is planted, and `check` and `train`
say its code; without it they say nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import upweight as uw
import upweight.recipes.start as run_start
from oracles import loaded
from runs import furnish, plain_rows, sentence, train, write_rows
from tiny import FALLBACK_FAMILIES, FAMILIES, tiny_model
from upweight.cli import main
from upweight.config import Run
from upweight.errors import Refusal
from upweight.models.load import LanguageModel
from upweight.trust.figures import FIELDS, FIGURES
from upweight.trust.identity import computed_together, require_alone


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    write_rows("pairs.jsonl", plain_rows())


def check(**values: object) -> dict[str, str]:
    """Code and sentence of what is found in pairs.jsonl."""
    usual = {"compute.dtype": "float32", "learning_rate": 1e-3}
    found = uw.check(**{"model": "model", "data": "pairs.jsonl", **usual, **values})
    return {f.code: f.sentence for f in found.findings}


def test_rows_reference_and_packing_with_nothing_wrong_raise_nothing(
    capsys: pytest.CaptureFixture[str],
):
    assert check() == {}
    assert train("run") == 0
    said = capsys.readouterr().err
    assert "warning[" not in said and "warning:" not in said
    account = json.loads(Path("run/account.json").read_text())
    assert account["findings"] == []
    assert account["figures"]["train"].keys() == FIGURES.keys()


def test_responses_that_say_they_did_not_stop_are_reported():
    def answered(num: int) -> None:
        write_rows("pairs.jsonl", [
            {"prompt": row["prompt"], "preferences": [[0, 1]], "responses": [
                {"text": row["chosen"], "stopped": i >= num}, {"text": row["rejected"]}]}
            for i, row in enumerate(plain_rows())
        ])  # fmt: skip

    answered(24)  # a fifth of 120 responses
    assert check() == {}
    answered(25)
    assert "25 of 120 responses say that they did not stop" in check()["UW203"]
    assert "25 of 60 responses" in check(objective="sft")["UW203"]
    assert check(objective="reward") == {}  # which reads a stop token behind them


def test_prompts_of_evaluations_that_are_mostly_too_long_are_refused():
    prompts = [{"prompt": "so on " * (1 if i % 3 else 40)} for i in range(10)]
    write_rows("prompts.jsonl", prompts)
    asked = {"evaluation.prompt_files": ["prompts.jsonl"], "max_length": 128}
    with pytest.raises(Refusal, match="prompts: 40% of rows dropped as too long") as caught:
        check(**asked)
    assert caught.value.code == "UW205"
    assert check(**asked, **{"preflight.cut": 0.4}) == {}


def test_a_plan_that_can_hardly_move_a_weight(capsys: pytest.CaptureFixture[str]):
    # Fewer rows than a step takes, at dpo's own rate: one step of 5e-7.
    said = check(learning_rate=None)["UW103"]
    assert "the whole run, 1 step at learning rates of 5e-07 at most, can move a weight" in said
    assert "by about 5e-07 (preflight.reach is 2e-06)" in said
    assert check(learning_rate=None, **{"preflight.reach": 0.0}) == {}
    assert check(learning_rate=None, lora=True) == {}
    adapted = check(learning_rate=1e-9, steps=8, lora=True)["UW103"]
    assert "8 steps at learning rates of 1e-09" in adapted and "lora: true" not in adapted
    held = check(steps=8, **{"optimizer.epsilon": 1e4})["UW103"]
    assert "optimizer.epsilon beside optimizer.max_grad_norm leaves 0.0001 of each" in held
    assert "UW103" in check(steps=8, **{"optimizer.max_grad_norm": 1e-14})
    assert check(steps=8, **{"optimizer.max_grad_norm": 1e-7}) == {}
    # The rates of n steps come to (n + 1) / 2 times their peak: 2e-6 is reached with 7.
    assert "UW103" in check(learning_rate=None, steps=6)
    assert check(learning_rate=None, steps=7) == {}
    constant = {"optimizer.schedule": "constant", "optimizer.warmup": 0.0}
    assert "UW103" in check(learning_rate=None, steps=3, **constant)
    assert check(learning_rate=None, steps=4, **constant) == {}
    assert check(learning_rate=None, objective="sft") == {}
    words = "train --model model --data pairs.jsonl --dtype float32 --out run"
    assert main(words.split()) == 0
    assert "warning[UW103]: the whole run, 1 step" in capsys.readouterr().err
    (found,) = json.loads(Path("run/account.json").read_text())["findings"]
    assert found["code"] == "UW103" and "UW103" in Path("run/report.html").read_text()


def test_rows_that_compare_a_response_with_itself():
    rows = plain_rows()
    for row in rows[:3]:
        row["rejected"] = row["chosen"]
    write_rows("pairs.jsonl", rows)
    said = check()["UW206"]
    assert "train: in 3 of 60 rows chosen and rejected are the same" in said
    assert "pairs.jsonl:1, pairs.jsonl:2, pairs.jsonl:3" in said
    assert check(**{"preflight.identical": 0.05}) == {}


def test_rows_that_are_the_same_only_after_cutting():
    rows = plain_rows()
    for row in rows[:3]:
        row["chosen"], row["rejected"] = ("stone " * 40 + end for end in ("one", "two"))
    write_rows("pairs.jsonl", rows)
    assert "UW206" not in check()
    cut = {"data.truncation": "response", "data.max_length": 150}
    assert "in 3 of 60 rows" in check(**cut)["UW206"]


def test_a_prompt_on_both_sides_is_refused_with_a_row_of_each():
    write_rows("held.jsonl", [plain_rows()[7] | {"prompt": " question 7\n"}])
    with pytest.raises(Refusal, match=r"such as held.jsonl:1 and pairs.jsonl:8.*UW209"):
        check(**{"evaluation.sets": {"held": ["held.jsonl"]}})


def held_out(*prompts: object) -> dict[str, str]:
    """What is found with a set of these prompts."""
    write_rows("held.jsonl", [plain_rows()[0] | {"prompt": prompt} for prompt in prompts])
    return check(**{"evaluation.sets": {"held": ["held.jsonl"]}})


def test_a_prompt_on_both_sides_in_other_letters_is_reported():
    system, asks = {"role": "system", "content": "s"}, {"role": "user", "content": "question 8"}
    said = held_out("QUESTION  7?", "question 77", [system, asks])["UW209"]
    assert "the evaluation set held has 2 rows with a prompt that is trained on too, but" in said
    assert "held.jsonl:1 (as pairs.jsonl:8), held.jsonl:3 (as pairs.jsonl:9)" in said
    answered = {"role": "assistant", "content": "Yes."}
    assert held_out("question 77", [asks, answered, asks]) == {}


def test_prompts_that_a_split_leaves_on_both_sides_in_other_letters_are_reported(
    capsys: pytest.CaptureFixture[str],
):
    twice = [row | {"prompt": row["prompt"] + end} for row in plain_rows() for end in ("", "?")]
    write_rows("pairs.jsonl", twice)
    assert "set heldout has" in check(**{"evaluation.fraction": 0.3})["UW209"]
    assert train("run", "--repeated", "0.9") == 0
    assert "warning[UW209]: the evaluation set heldout" in capsys.readouterr().err


def test_rows_that_are_nearly_those_of_an_earlier_row():
    rows = plain_rows()
    shouted = [{key: f"{text.upper()}!" for key, text in row.items()} for row in rows[:4]]
    write_rows("pairs.jsonl", [*rows, *shouted])
    said = check()["UW210"]
    assert "4 of 64 rows repeat an earlier one, or nearly" in said
    assert "pairs.jsonl:61 (as pairs.jsonl:1)" in said
    assert check(**{"preflight.repeated": 0.1}) == {}
    long = "seven wheels of paper on a green river to the north"
    close = {"prompt": "how", "chosen": long, "rejected": long[::-1]}
    write_rows("pairs.jsonl", [*rows, close, *(close | {"chosen": long + c} for c in "abcd")])
    assert "4 of 65 rows repeat" in check()["UW210"]


def test_responses_that_differ_in_next_to_nothing():
    rows = plain_rows()
    for row in rows[:10]:
        row["chosen"] += " and so on and on"
        row["rejected"] = row["chosen"].replace(" so ", " yo ")
    write_rows("pairs.jsonl", rows)
    said = check(**{"preflight.edits": 0.1})["UW210"]
    assert "in 10 of 60 preferences the responses differ in at most 10% of their tokens" in said
    assert check(**{"preflight.edits": 0.1, "preflight.similar": 0.2}) == {}


def test_many_rows_without_a_word_in_a_response_are_reported():
    rows = [row | {"rejected": " " if i < 4 else row["rejected"]} for i, row in
            enumerate(plain_rows())]  # fmt: skip
    write_rows("pairs.jsonl", rows)
    said = check()["UW210"]
    assert "train: 4 of 60 rows have an empty rejected response, without a word, and are" in said
    assert "Rows: pairs.jsonl:1, pairs.jsonl:2" in said
    assert check(**{"preflight.empty": 0.1}) == {}
    for i, row in enumerate(rows):
        rows[i] = row | ({"chosen": ""} if i in (2, 3, 4) else {})
    write_rows("pairs.jsonl", rows)
    said = check()["UW210"]
    assert "2 of 60 rows have an empty rejected response and 2 of 60 rows have an empty" in said
    assert "empty chosen and rejected response and 1 of 60 rows have an empty chosen" in said
    texts = [{"text": text, "score": i} for i, text in enumerate(("a b", "", "c d e"))]
    write_rows("pairs.jsonl", [{"prompt": f"q {i}", "responses": texts} for i in range(9)])
    assert (
        "train: 9 of 27 responses are empty, without a word"
        in check(**{"preflight.shortcut": 0.99})["UW210"]
    )


@pytest.mark.parametrize(
    "beside",
    [
        {"score_chosen": 1.0, "score_rejected": 9.0},
        {"chosen-rating": 1, "rejected-rating": 2},
        {"margin": -3.0},
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_scores_beside_pairs_that_contradict_them_are_reported(
    ending: str, beside: dict[str, float]
):
    def found(rows: list[dict[str, object]]) -> dict[str, str]:
        write_rows("pairs.jsonl", rows)
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), "pairs.parquet")
        if ending == "csv":
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            Path("pairs.csv").write_text("\n".join(lines))
        return check(data=f"pairs.{ending}")

    said = found([row | beside for row in plain_rows()])["UW207"]
    assert "in 60 of 60 pairs with scores of both responses or a margin beside them" in said
    assert f"Rows: pairs.{ending}:{1 + (ending == 'csv')}" in said
    right = {name: -value for name, value in beside.items()}
    assert found([row | right for row in plain_rows()]) == {}
    same = dict.fromkeys(beside, 0.0)
    assert found([row | same for row in plain_rows()]) == {}


def test_scores_that_contradict_the_preferences_stated_beside_them_are_reported():
    def rows(preferences: object, scores: list[object]) -> list[dict[str, object]]:
        return [
            {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "wheel"],
             "scores": scores, "preferences": preferences}
            for row in plain_rows()
        ]  # fmt: skip

    stated = [[0, 1], [2, 1]]
    write_rows("pairs.jsonl", rows(stated, [1, 9, 10]))
    said = check()["UW207"]
    assert "in 60 of 120 pairs" in said and "Rows: pairs.jsonl:1, pairs.jsonl:2" in said
    assert "UW207" not in check(**{"data.pairing": "all"})
    for agreeing in ([9, 1, 2], [1, 1, 2], [None, 1, None]):
        write_rows("pairs.jsonl", rows(stated, agreeing))
        assert "UW207" not in check()


@pytest.mark.parametrize("value", [10**310, "1" * 400, "nan", True, "high", [1], None])
def test_a_score_that_is_no_finite_number_says_nothing(value: object):
    for other in ({"score_rejected": 0.5}, {}):
        write_rows("pairs.jsonl", [row | {"score_chosen": value} | other for row in plain_rows()])
        assert check() == {}


def test_labels_that_are_as_likely_the_other_way_round_are_reported():
    write_rows("pairs.jsonl", [row | {"probability": 0.5} for row in plain_rows()])
    assert "60 of 60 preferences have a probability of 0.5" in check()["UW210"]
    write_rows("pairs.jsonl", [row | {"probability": 0.6} for row in plain_rows()])
    assert check() == {}


def lengths(longer: str, shorter: str) -> list[dict[str, str]]:
    draw = random.Random(2)
    return [
        {"prompt": f"question {i}", longer: sentence(draw, 7), shorter: sentence(draw, 6)}
        for i in range(40)
    ]


def test_columns_that_are_swapped_by_the_length_of_what_they_hold():
    write_rows("pairs.jsonl", lengths("rejected", "chosen"))
    said = check(**{"preflight.shortcut": 0.99})["UW207"]
    assert "the longer response is the chosen one in only" in said and "pairs.jsonl:" in said
    assert "a guess from their lengths alone" in said and "Read a few rows: if the rej" in said
    assert check(**{"preflight.shortcut": 0.99, "preflight.swapped": 0.0}) == {}
    judged = check(**{"preflight.shortcut": 0.99}, objective="reward")["UW207"]
    assert "the longer response is the chosen one in only" in judged
    write_rows("pairs.jsonl", lengths("chosen", "rejected"))
    assert check(**{"preflight.shortcut": 0.99}) == {}
    assert check(**{"preflight.shortcut": 0.99}, objective="reward") == {}


def test_data_that_the_reference_would_never_say(capsys: pytest.CaptureFixture[str]):
    # A model that is sure of its next byte, whatever it is: nothing that people wrote is likely.
    sure = tiny_model()
    with torch.no_grad():
        sure.get_output_embeddings().weight *= 8
    sure.save_pretrained("model")
    said = check()["UW212"]
    assert "nats a token under the reference" in said and "pairs.jsonl:" in said
    assert check(**{"preflight.improbable": 99.0}) == {}
    assert train("run") == 0
    assert "warning[UW212]: train:" in capsys.readouterr().err


def plant(monkeypatch: pytest.MonkeyPatch, hear: Callable[[Tensor], Tensor]) -> None:
    """The policy's embeddings are changed by `hear`, after the proof that every model has to pass
    when it is loaded."""
    made = run_start.load_policy

    def planted(run: Run) -> LanguageModel:
        lm = made(run)
        embedding = lm.causal.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        embedding.register_forward_hook(lambda _, __, out: hear(out))
        return lm

    monkeypatch.setattr(run_start, "load_policy", planted)


def test_rows_that_hear_their_neighbours_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plant(monkeypatch, lambda out: out + 0.1 * out.mean(1, keepdim=True))
    with pytest.raises(Refusal, match=r"says something else packed with others than alone.*UW301"):
        check()
    assert train("run") == 2
    assert "error[UW301]" in capsys.readouterr().err


def padding_is_heard(out: Tensor) -> Tensor:
    return out + 0.1 * out.mean(1, keepdim=True) if len(out) > 1 else out


def test_prompts_that_hear_their_padding_are_refused(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, padding_is_heard)
    with pytest.raises(Refusal, match=r"else padded, as sampling does it, than alone.*UW301"):
        check()


def test_unshared_rows_that_hear_their_padding_are_refused(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, padding_is_heard)
    with pytest.raises(Refusal, match=r"else packed with others than alone.*UW301"):
        check(**{"compute.sharing": False})


@pytest.mark.parametrize("family", [*FAMILIES, *FALLBACK_FAMILIES])
def test_no_family_hears_its_neighbours(family: str):
    trees = uw.check(model="model", data="pairs.jsonl").trees["train"]
    assert require_alone(loaded(family), computed_together(trees)) < 1e-3


@pytest.mark.parametrize("objective", ["dpo", "sft", "reward", "grpo"])
def test_noise_is_refused_by_check_too(objective: str, monkeypatch: pytest.MonkeyPatch):
    made = run_start.trained

    def noisy(run: Run, lm: LanguageModel, stop_ids: object) -> LanguageModel:
        lm = made(run, lm, stop_ids)
        embedding = lm.causal.get_input_embeddings()
        embedding.register_forward_hook(lambda _, __, out: nn.functional.dropout(out, 0.1))
        return lm

    monkeypatch.setattr(run_start, "trained", noisy)
    asked = {"rollout.reward": "number", "loss.beta": 0.05} if objective == "grpo" else {}
    with pytest.raises(Refusal, match="UW106"):
        check(objective=objective, **asked)


def test_check_holds_the_policy_against_a_reference_that_is_named():
    assert train("start", "--epochs", "4") == 0
    assert "is another meant?" in check(reference="start/model")["UW101"]
    assert check(reference="model") == {}


def test_check_prints_for_machines_what_its_fields_say(capsys: pytest.CaptureFixture[str]):
    words = ["check", "--model", "model", "--data", "pairs.jsonl", "--fraction", "0.2", "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == FIELDS.keys() - {"later_stages"}
    assert set(said["sets"]) == set(said["figures"]) == {"train", "heldout"}
    assert said["figures"]["train"].keys() == FIGURES.keys()
    words_alone = said["figures"]["train"]["words"]
    assert words_alone["low"] < words_alone["value"] < words_alone["high"]
    assert said["memory"]["needed"] > 0 and said["plan"]["total_steps"] == 1
    (first, *_) = said["rows"]
    assert len(said["rows"]) == 3 and first["row"].startswith("pairs.jsonl:")
    assert [r["role"] for r in first["responses"]] == ["chosen", "rejected"]
    assert {r["stop"] for r in first["responses"]} == {"<|im_end|>"}
    assert main([*words, "--max_length", "75"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "UW205"
    assert main([*words, "--beta", "none"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] is None


def test_one_row_has_no_interval_and_is_json_all_the_same(capsys: pytest.CaptureFixture[str]):
    write_rows("pairs.jsonl", plain_rows(1))
    assert main(["check", "--model", "model", "--data", "pairs.jsonl", "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    said = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert said["figures"]["train"]["own_nats"]["low"] is None


def test_check_prints_what_it_measured_and_three_rows(capsys: pytest.CaptureFixture[str]):
    assert main(["check", "--model", "model", "--data", "pairs.jsonl"]) == 0
    said = capsys.readouterr().out
    for name, about in FIGURES.items():
        assert about in said, name
    assert said.count("\nchosen   | ") == said.count("\nrejected | ") == 3
    printed = repr(uw.check(model="model", data="pairs.jsonl"))
    assert "train: 60 rows read" in printed and "rejected | " in printed
