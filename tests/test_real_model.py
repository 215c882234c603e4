"""On the demo's model and real text: what is scored is what plain transformers gives."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import upweight as uw
import upweight.demo as demo
from upweight.cli import main
from upweight.errors import ModelError
from upweight.models.named import demo_model_path, resolve

OWN = Path(__file__).parent / "real_rows.jsonl"
DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return resolve(demo_model_path())
    except ModelError as error:
        pytest.skip(str(error))


def rows_of(file: Path, num: int) -> list[dict]:
    if not file.is_file():
        pytest.skip(f"shared/data/{file.name} is not there")
    with file.open() as lines:
        return [json.loads(line) for line in islice(lines, num)]


def plain_logp(model, tokenizer, prompt: str, answer: str) -> tuple[float, int]:
    """One sequence through plain transformers: the answer and its stop token, summed, in nats."""
    turns = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, answer)]
    answer_ids = [*ids[1], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids[0], *answer_ids]])).logits[0].double()
    predicted = logits[len(ids[0]) - 1 : -1].log_softmax(-1)
    return predicted.gather(1, torch.tensor(answer_ids)[:, None]).sum().item(), len(answer_ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "num"),
    [
        (OWN, 13),
        (DATA / "truthfulqa_pairs.jsonl", 12),
        (DATA / "gsm8k_responses.jsonl", 3),
        (DATA / "longprompt_pairs.jsonl", 3),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_score_equals_one_plain_forward_per_sequence_on_real_rows(
    folder: str, file: Path, num: int, tmp_path: Path
):
    rows, out = rows_of(file, num), tmp_path / "scores.jsonl"
    words = ["--data", str(file), "--limit", str(num), "--dtype", "float32"]
    assert main(["score", "--model", folder, *words, "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({score["row"] for score in scores}) == num
    known: dict[tuple[int, int], tuple[float, int]] = {}
    for score in scores:
        line = int(score["row"].rsplit(":", 1)[1]) - 1
        row = rows[line]
        texts = (
            [r["text"] for r in row["responses"]]
            if "responses" in row
            else [row["chosen"], row["rejected"]]
        )
        for side in ("chosen", "rejected"):
            index = score[side]
            if (line, index) not in known:
                known[line, index] = plain_logp(model, tokenizer, row["prompt"], texts[index])
            logp, tokens = known[line, index]
            assert score[f"tokens_{side}"] == tokens
            worst = max(worst, abs(score[f"logp_{side}"] - logp))
    assert worst <= 1e-3, worst
    print(f"{file.name}: {len(known)} responses, largest difference {worst:.2e} nats")


DEMO = Path(demo.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        DEMO / "train.jsonl",
        DATA / "truthfulqa_pairs.jsonl",
        DATA / "gsm8k_responses.jsonl",
        DATA / "longprompt_pairs.jsonl",
    ],
    ids=lambda file: file.stem,
)
def test_check_finds_nothing_in_data_with_nothing_wrong(folder: str, file: Path):
    if not file.is_file():
        pytest.skip(f"shared/data/{file.name} is not there")
    # An adapter: the demo's 218 preferences are 4 steps, with which all weights would not move.
    found = uw.check(model=folder, data=str(file), lora=True)
    assert found.findings == ()
    figures = found.figures["train"]
    print(f"{file.name}: {figures}")
    # Where the model is the reference and the dtype fp32, packing and padding are rounding alone.
    assert figures["alone_nats"].value < 1e-3
    assert figures["own_nats"].value - figures["data_nats"].value < 1.5
