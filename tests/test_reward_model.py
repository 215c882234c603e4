"""The reward model: how it is trained, read, scored with and kept from being anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import upweight as uw
from runs import PAIRS, furnish_rewarded, judge, online, records, rows_of, train, write_rows
from upweight.cli import main
from upweight.config import load_run
from upweight.errors import DataError
from upweight.models.load import load
from upweight.models.scalar import load_reward_model, one_response_at_a_time, tree_scores
from upweight.recipes.online import values_of
from upweight.recipes.prepare import prepare
from upweight.recipes.rewarding import make_scorer
from upweight.types import ResponseId, RowId, Tree

ROW = RowId("x", 1)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish_rewarded(tmp_path, monkeypatch)


@pytest.mark.parametrize("lora", [(), ("--lora", "true", "--learning-rate", "3e-2")])
def test_a_reward_model_learns_to_rank_and_plain_transformers_reads_its_scores(lora):
    assert judge("run", "--epochs", "3", *lora) == 0
    evals = records("run", "eval")
    assert evals[-1]["rewards/accuracies"] == 1.0 > evals[0]["rewards/accuracies"] - 1e-9
    model = load_reward_model("run/model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    ids = [tuple(tokenizer(text)["input_ids"]) for text in ("question 3", "fine ", "bad thing")]
    where = tuple(ResponseId(RowId("x", 1), k) for k in range(2))
    tree = Tree(ids[0], (ids[1], ids[2]), (), where, (False, False))
    plain = AutoModelForSequenceClassification.from_pretrained("run/model").eval()
    assert plain.config.pad_token_id == tokenizer.pad_token_id is not None
    # fp32's 1e-5 is of what a score is a sum of, some 1 each, also where the sum itself is near 0.
    found = pytest.approx(one_response_at_a_time(plain, tree), rel=1e-5, abs=1e-5)
    assert tree_scores(model, [tree])[0] == found
    # In a padded batch too: the score is read at the last token that is not padding.
    rows = [[*ids[0], *ids[1]], [*ids[0], *ids[2]]]
    width = max(map(len, rows))
    padded = torch.tensor([r + [plain.config.pad_token_id] * (width - len(r)) for r in rows])
    with torch.no_grad():
        batch = plain(padded, attention_mask=(padded != plain.config.pad_token_id).long())
    assert batch.logits[:, 0].tolist() == pytest.approx(tree_scores(model, [tree])[0], abs=1e-4)


def test_a_reward_model_is_no_policy_and_no_reference(capsys: pytest.CaptureFixture[str]):
    assert judge("judge", "--steps", "1") == 0
    capsys.readouterr()
    rows = "--data pairs.jsonl"
    for words in (
        f"train --model judge/model {rows} --out run",
        f"train --model judge/model {rows} --objective sft --out run",
        f"train --model model --reference judge/model {rows} --out run",
        f"check --model judge/model {rows}",
        "sample --model judge/model --prompts prompts.jsonl --out answers.jsonl",
        f"score --model model --reference judge/model {rows} --out scores.jsonl",
    ):
        assert main(words.split()) == 2
        said = capsys.readouterr().err
        assert "judge/model is a reward model (its config.json names LlamaForSequence" in said
        assert "Give the model that it was trained from. A reward model goes to rollout" in said
    assert not Path("run").exists()
    assert main(["check", "--model", "judge/model"]) == 2
    said = capsys.readouterr().err
    assert "judge/model is a reward model: it gives no log-probs to compare" in said
    assert "upweight score --model judge/model --data FILE" in said


def test_a_run_is_resumed_with_the_reward_model_that_it_began_with_only(capsys):
    assert judge("judge", "--steps", "1") == 0
    assert online("run", "grpo", "--reward", "judge/model", "--steps", "2") == 0
    # Its rows are not read by a model: a column more does not matter.
    write_rows("prompts.jsonl", [{**row, "answer": 1} for row in rows_of("prompts.jsonl")])
    assert main(["train", "run/run.yaml", "resume=true"]) == 0
    assert judge("other", "--steps", "2") == 0
    shutil.rmtree("judge")
    Path("other").rename("judge")
    assert main(["train", "run/run.yaml", "resume=true"]) == 2
    assert "resume: rollout.reward is judge/model, whose content is" in capsys.readouterr().err


def test_a_value_model_has_the_reward_models_trunk_and_a_head_of_zeros():
    assert judge("judge") == 0
    assert online("run", "ppo", "--reward", "judge/model") == 0
    run = load_run("run/run.yaml").run
    lm = load("model", dtype="float32")
    values = values_of(run, lm, [2])
    assert values is not None and values.critic is not None
    found, theirs = values.critic.model.state_dict(), load_file("judge/model/model.safetensors")
    head = {name for name in theirs if name.startswith("score.")}
    assert found.keys() == theirs.keys() and head == {"score.weight"}
    assert not found["score.weight"].any()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs.keys() - head)
    # The policy's own would be another start: the reward model has learned since.
    policy = lm.causal.state_dict()
    assert not any(torch.equal(found[name], policy[name]) for name in theirs.keys() - head)


def test_a_reward_model_says_the_same_of_a_cut_answer_wherever_it_is_asked():
    rows = rows_of("pairs.jsonl")
    for i, row in enumerate(rows):
        best = {"text": row.pop("chosen"), "score": 1, "stopped": i % 2 == 0}
        row["responses"] = [best, {"text": row.pop("rejected"), "score": 0}]
    write_rows("pairs.jsonl", rows)
    assert judge("judge", "--steps", "1") == 0
    found = uw.score(model="judge/model", data="pairs.jsonl", dtype="float32")
    run = load_run(None, values={"model": "model", "data": {"path": "pairs.jsonl"}}).run
    lm = load("model", dtype="float32")
    prepared = prepare(run, lm)
    trees = prepared.trees["train"]
    assert {tree.stopped for tree in trees} == {(True, True), (False, True)}
    scores = make_scorer("judge/model", run, lm, prepared.renderer.end)(trees)
    wanted = {str(t.ids[0].row): s[0] for t, s in zip(trees, scores, strict=True)}
    assert all(r["score_chosen"] == pytest.approx(wanted[r["row"]], abs=1e-4) for r in found)


def test_a_reward_model_of_fewer_positions_than_an_answer_says_so():
    assert judge("judge") == 0
    config = json.loads(Path("judge/model/config.json").read_text())
    config["max_position_embeddings"] = 16
    Path("judge/model/config.json").write_text(json.dumps(config))
    run = load_run(None, values={"model": "model", "data": {"path": "pairs.jsonl"}}).run
    score = make_scorer("judge/model", run, load("model", dtype="float32"), 2)
    fits = Tree((5,) * 12, ((8, 9, 7, 6),), (), (ResponseId(ROW, 0),), (False,))
    assert len(score([fits])[0]) == 1
    for stopped in (True, False):
        long = Tree((5,) * 12, ((8,) * 5,), (), (ResponseId(ROW, 0),), (stopped,))
        with pytest.raises(DataError, match="made for 16 tokens, and a prompt with its answer has"):
            score([long])


def test_a_reward_model_reads_an_answer_that_was_cut_with_a_stop_token_behind_it():
    assert judge("judge") == 0
    run, lm = (
        load_run(
            None, values={"model": "model", "dtype": "float32", "data": {"path": "pairs.jsonl"}}
        ).run,
        load("model", dtype="float32"),
    )
    plain = AutoModelForSequenceClassification.from_pretrained("judge/model").eval()
    score, ids = make_scorer("judge/model", run, lm, 2), tuple(ResponseId(ROW, k) for k in range(3))
    long = (7,) * (plain.config.max_position_embeddings - 3)
    said = Tree((5, 6, 7), ((8, 9), (8, 2), long), (), ids, (False, True, False))
    whole = Tree((5, 6, 7), ((8, 9, 2), (8, 2), (*long[:-1], 2)), (), ids, (True,) * 3)
    assert score([said])[0] == pytest.approx(one_response_at_a_time(plain, whole), abs=1e-5)
    assert score([said])[0] != pytest.approx(one_response_at_a_time(plain, said), abs=1e-3)


def test_score_gives_a_reward_models_scores_of_each_preference(
    capsys: pytest.CaptureFixture[str],
):
    assert judge("run") == 0
    group = [{"text": "fine", "score": 3}, {"text": "so so", "score": 1}, {"text": "bad thing"}]
    write_rows(
        "scored.jsonl",
        [
            {"prompt": "one", "responses": ["fine fine", "bad"], "preferences": [[0, 1]]},
            {"prompt": "two", "responses": group, "preferences": [[0, 2], [1, 2]]},
            {"prompt": "three", "responses": group},
        ],
    )
    words = "score --model run/model --data scored.jsonl --dtype float32 --out"
    assert main([*words.split(), "scores.jsonl"]) == 0
    rows = rows_of("scores.jsonl")
    right = sum(row["margin"] > 0 for row in rows)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "by the reward model's score: " in said
    assert said.endswith(f", {right} of 4 preferences of 3 prompts")
    assert [(r["row"], r["chosen"], r["rejected"]) for r in rows] == [
        ("scored.jsonl:1", 0, 1),
        ("scored.jsonl:2", 0, 2),
        ("scored.jsonl:2", 1, 2),
        ("scored.jsonl:3", 0, 1),
    ]
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    plain = AutoModelForSequenceClassification.from_pretrained("run/model").eval()

    def score(prompt: str, answer: str) -> tuple[float, int]:
        asked = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids, own = (tokenizer(text)["input_ids"] for text in (start, f"{answer}<|im_end|>"))
        with torch.no_grad():
            return plain(torch.tensor([[*ids, *own]])).logits.item(), len(own)

    for row, prompt, chosen, rejected in zip(
        rows,
        ["one", "two", "two", "three"],
        ["fine fine", "fine", "so so", "fine"],
        ["bad", "bad thing", "bad thing", "so so"],
        strict=True,
    ):
        (c, tokens_chosen), (r, tokens_rejected) = score(prompt, chosen), score(prompt, rejected)
        assert row["score_chosen"] == pytest.approx(c, abs=1e-5)
        assert row["score_rejected"] == pytest.approx(r, abs=1e-5)
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]
        assert (row["tokens_chosen"], row["tokens_rejected"]) == (tokens_chosen, tokens_rejected)
    assert uw.score(model="run/model", data="scored.jsonl", dtype="float32") == rows
    assert main([*words.split(), "no.jsonl", "--reference", "model"]) == 2
    said = capsys.readouterr().err
    assert "UW109" in said and "reference is model, and run/model is a reward model" in said
    assert not Path("no.jsonl").exists()


def test_a_reward_model_is_asked_for_the_rows_margins(capsys: pytest.CaptureFixture[str]):
    pairs = [
        {**row, "margin": 4.0 if i % 2 else 0.0} for i, row in enumerate(rows_of("pairs.jsonl"))
    ]
    write_rows("margins.jsonl", pairs)
    Path("margins.jsonl").rename("pairs.jsonl")
    assert judge("run", "--steps", "2", "--loss.margin", "0.5") == 0
    assert judge("none", "--steps", "2") == 0
    # Step 1 has the same scores in both: what is added is what -log sigmoid(z - m) adds.
    asked, plain = (records(run, "train")[0] for run in ("run", "none"))
    assert asked["rewards/margins"] == plain["rewards/margins"]
    assert 0.1 < asked["loss"] - plain["loss"] < 2.0
    unused = json.loads(Path("none/account.json").read_text())["sets"]["train"]["unused_columns"]
    assert unused == {"margin": 24}  # of the file, before it is split
    # A margin that a run does not read may be anything.
    write_rows("words.jsonl", [{**row, "margin": "large"} for row in pairs])
    assert train("words", "--data", "words.jsonl", "--steps", "1") == 0
    capsys.readouterr()
    write_rows("pairs.jsonl", PAIRS)
    assert judge("no", "--loss.margin", "0.5") == 2
    assert "loss.margin is 0.5, and no row has a margin, or scores" in capsys.readouterr().err
