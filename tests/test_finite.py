"""A model that has no number for some rows is refused with those rows, wherever it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import upweight as uw
from oracles import loaded, random_trees
from runs import furnish, plain_rows, train, write_rows
from tiny import FAMILIES, byte_tokenizer
from upweight.data.pack import collate
from upweight.errors import Refusal
from upweight.models.finite import finite
from upweight.models.logprobs import token_logps
from upweight.models.reference import fill, open_reference

BROKEN = "~"
"""A token whose embedding is no number."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model("llama", **FAMILIES["llama"], tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(BROKEN)] = torch.nan
    model.save_pretrained("model")
    write_rows("pairs.jsonl", ROWS)


ROWS = plain_rows(40)


def with_broken(*numbers: int, **changes: str) -> list[dict[str, Any]]:
    changes = changes or {"rejected": f"a {BROKEN} or two"}
    return [row | changes if i in numbers else row for i, row in enumerate(ROWS)]


def refused(**values: object) -> str:
    usual = {"model": "model", "data": "pairs.jsonl", "learning_rate": 1e-3}
    with pytest.raises(Refusal) as caught:
        uw.check(**{**usual, **values})
    assert caught.value.code == "UW303", caught.value
    assert "weights are not finite (tensors: 1, first model.embed_tokens.weight)" in str(
        caught.value
    )
    return str(caught.value)


def test_rows_without_the_broken_token_raise_nothing():
    assert uw.check(model="model", data="pairs.jsonl", learning_rate=1e-3).findings == ()


def test_rows_for_which_the_reference_has_no_number_are_named(capsys: pytest.CaptureFixture[str]):
    write_rows("pairs.jsonl", with_broken(7, 20))
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW303]" in said and "Traceback" not in said
    rows = said.rpartition("Rows: ")[2].partition(".  Run")[0]
    assert sorted(rows.split(", ")) == ["pairs.jsonl:21", "pairs.jsonl:8"]


def test_every_row_that_check_asks_about_is_named_and_no_other_code_is_said():
    write_rows("pairs.jsonl", [row | {"chosen": f"{BROKEN} {row['chosen']}"} for row in ROWS])
    assert "model gives log-probs that are no finite numbers" in refused()
    assert "UW301" not in refused()
    refused(objective="sft")


def test_held_out_rows_without_a_number_are_named():
    broken = with_broken(3, chosen=f"{BROKEN} it is")
    write_rows("held.jsonl", [row | {"prompt": f"held {row['prompt']}"} for row in broken])
    sets = {"evaluation.sets": {"held": ["held.jsonl"]}, "compute.dtype": "float32"}
    for objective, more in (("sft", {"evaluation.samples": 0}), ("reward", {})):
        values = {"objective": objective, "out": objective, **sets, **more}
        with pytest.raises(Refusal, match="no finite numbers") as caught:
            uw.train(model="model", data="pairs.jsonl", learning_rate=1e-3, steps=2, **values)
        assert caught.value.code == "UW303" and "Rows: held.jsonl:4." in str(caught.value)
        assert '"UW303"' in Path(objective, "metrics.jsonl").read_text()


def test_prompts_whose_answers_have_no_number_are_named():
    prompts = [{"prompt": f"{'~' if i == 2 else 'and'} question {i}?"} for i in range(6)]
    write_rows("prompts.jsonl", prompts)
    values = {"evaluation.prompt_files": ["prompts.jsonl"], "evaluation.samples": 6}
    values |= {"evaluation.max_new_tokens": 2}  # of more, some say the broken token themselves
    with pytest.raises(Refusal, match="no finite numbers") as caught:
        uw.train(model="model", data="pairs.jsonl", learning_rate=1e-3, steps=2, out="r", **values)
    assert caught.value.code == "UW303" and "Rows: prompts.jsonl:3." in str(caught.value)


def test_scoring_refuses_what_is_no_number():
    write_rows("pairs.jsonl", with_broken(5))
    with pytest.raises(Refusal, match=r"UW303") as caught:
        uw.score(model="model", data="pairs.jsonl")
    assert "Rows: pairs.jsonl:6." in str(caught.value)


def test_neighbours_of_a_row_without_a_number_are_not_named():
    lm, trees = loaded("llama"), random_trees([(4, 3), (4, 3), (4, 3)], seed=1)
    poisoned = trees[1].ids[0].row

    def read(lm: Any, forest: Any) -> torch.Tensor:
        logps = token_logps(lm, forest)
        rows = [of.row for tree in forest.trees for of in tree.ids]
        return logps * torch.nan if poisoned in rows else logps

    assert len(trees) > 1
    with torch.no_grad(), pytest.raises(Refusal, match=f"overflowed.*Rows: {poisoned}\\."):
        finite(read, lm)(collate(trees))


def test_a_score_is_one_value_for_each_response():
    lm, (tree,) = loaded("llama"), random_trees([(4, 3)], seed=1)
    rows = tuple(replace(of, row=replace(of.row, line=100 + k)) for k, of in enumerate(tree.ids))
    tree = replace(tree, ids=rows)

    def read(lm: Any, forest: Any) -> torch.Tensor:
        scores = torch.zeros(sum(len(tree.responses) for tree in forest.trees))
        scores[-1] = torch.inf
        return scores

    last = rows[-1].row
    with pytest.raises(Refusal, match=f"gives scores that.*Rows: {last}\\."):
        finite(read, lm, "scores")(collate([tree]))


def test_what_is_kept_and_is_no_number_is_computed_anew(tmp_path: Path):
    lm, trees = loaded("llama"), random_trees([(4, 3)], seed=1)
    kept = open_reference("f", lm, tmp_path)

    fill(kept, lm, trees, 1000)
    assert not open_reference("f", lm, tmp_path).missing(trees)
    (part,) = (tmp_path / "f").glob("part-*.parquet")

    table = pq.read_table(part)
    logps = table["logps"].to_pylist()
    logps[0][0] = float("nan")
    pq.write_table(table.set_column(1, "logps", pa.array(logps, table["logps"].type)), part)
    assert open_reference("f", lm, tmp_path).missing(trees) == trees
