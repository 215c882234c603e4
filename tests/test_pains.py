"""What people type wrong when they align a model, and the one message that each mistake gets.

One line for each mistake that a configuration can make. What only shows in rows, in training or in
the export is tested where its code is.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from runs import PAIRS, furnish, train, write_rows
from tiny import CHATML, byte_tokenizer, save_tiny, tiny_model
from upweight.config.keys import ELSEWHERE, candidates, keys


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


PAINS = {
    "a reference with other tokens": (
        "--reference foreign",
        "reference foreign has another vocabulary than model",
    ),
    "a reference that is not there": ("--reference base/of/sft", "no folder base/of/sft"),
    "stuck at ln 2 because the rate is 0": (
        "--learning-rate 0",
        "must be a number > 0 or null, found 0.",
    ),
    "a rate that rounds to nothing": ("--learning-rate 1e-30", "raise optimizer.learning_rate"),
    "no stop token": ("--model endless", "The tokenizer has no end-of-text token"),
    "all rows too long": ("--data.max_length 20", "19 x too_long: longer than max_length"),
    "many responses cut": (
        "--data.max_length 36 --truncation response",
        "of rejected responses cut (preflight.cut is 20%)",
    ),
    "longer rows than the model has positions": (
        "--data.max_length 4096",
        "data.max_length is 4,096, and model was made for 512 positions at most.",
    ),
    "a prompt budget of its own": (
        "max_prompt_length=128",
        "Here that is data.max_length: Most tokens of prompt and response together",
    ),
    "an option that is ignored": ("loss.betta=0.2", "Did you mean beta?"),
    "an option of another objective": ("loss.gamma=0.2", 'is not an option of "dpo", which takes'),
    "an option of a switched-off part": ("--merge", "export.merge is true, and it has no effect"),
    "a template variable that is not read": (
        "--template_options '{enable_thinking: false}'",
        "data.template_options.enable_thinking is false, and the model's chat template does not",
    ),
    "a variable that the template has under another name": (
        "--model styled --template_options '{stile: curt}'",
        "Did you mean style?",
    ),
    "a chat template where the model has none": ("--model plain --template chat", "no chat templ"),
    "half precision for weights": ("--dtype float16", "must be auto, float32 or bfloat16, found"),
    "dropout of 1": ("--lora.dropout 1", "must be a number >= 0 and < 1, found 1."),
    "batches that are multiplied": (
        "gradient_accumulation_steps=8",
        "Here that is batch.pairs_per_step: Preferences per optimizer step.",
    ),
    "a batch by device": (
        "--per-device-train-batch-size 8",
        "Here that is batch.pairs_per_step: Preferences per optimizer step.",
    ),
    "steps and epochs": ("steps=5 epochs=1", "epochs=1 and steps=5 contradict each other."),
    "a merge of what is one matrix with the head": (
        "--model tied --lora.targets [lm_head]",
        "lm_head is one matrix with the model's other end",
    ),
    "adapters on no layer": ("--lora.targets [qproj]", "match no layer"),
    "the same prompts in training and evaluation": (
        "--evaluation.sets '{test: pairs.jsonl}' --fraction 0",
        "with a prompt that is trained on too",
    ),
    "an evaluation without rows to evaluate": (
        "--fraction 0 --evaluation.every 5",
        "it has no effect without an evaluation: give evaluation.sets, evaluation.fraction",
    ),
    "the best by a metric that is not recorded": (
        "--checkpoint.best accuracy",
        "checkpoint.best is accuracy, which no evaluation of this run records.",
    ),
    "beta of 0": ("--beta 0", "--beta must be above 0 for dpo"),
    "labels that are all noise": ("--label_smoothing 0.5", "must be a number >= 0 and < 0.5"),
    "a variant that is no objective": (
        "--objective ddpo",
        "must be dpo, sft, reward, ppo, grpo, rloo or online_dpo, found",
    ),
    "the loss by its name elsewhere": (
        "loss_type=sigmoid",
        "Here that is objective: What is optimized. One of: dpo, sft,",
    ),
    "a loss that is not here by its name elsewhere": (
        "loss_type=ipo",
        "ipo: It is none that upweight has.",
    ),
    "one name for two lengths": (
        "max_completion_length=9",
        "Here that is data.max_length: Most tokens of prompt and response together; null: the "
        "model's limit. Or rollout.max_tokens",
    ),
    "answers to a prompt by trl's name": ("num_generations=4", "Here that is rollout.responses"),
    "a term that is not here": ("rpo_alpha=1", "is no term of a loss here"),
    "a temperature of rounds": (
        "objective=grpo temperature=0.7",
        "temperature would be that of evaluations: grpo learns from answers that the policy itself",
    ),
    "the usual loss by its name elsewhere": ("objective=sigmoid", 'found "sigmoid". That is dpo.'),
    "a loss that is not here": ("objective=ipo", 'found "ipo". It is none that upweight has.'),
    "the rank by peft's name": ("lora.r=8", "Here that is lora.rank: Rank of every adapter."),
    "pairings of rows that have no scores": (
        "--pairing adjacent",
        "data.pairing is adjacent, and no row has scores: their preferences are stated.",
    ),
    "another layout than the rows have": ("--format responses", 'has no "responses"'),
    "a graphics card that is not there": ("--device cuda", "torch sees no CUDA device"),
    "attention that a family cannot share": (
        "--model recurrent --attention dense",
        "mamba keeps a recurrent state. Use compute.attention=auto.",
    ),
    "a folder that holds a run": ("--out done", "done holds a run already"),
    "other settings than the run that goes on": (
        "--out done --resume --beta 0.3",
        "loss.beta is 0.3 here and was 0.1",
    ),
}
NEEDS_RUN = {"a folder that holds a run", "other settings than the run that goes on"}


def _models() -> None:
    for name in ("foreign", "endless", "styled", "plain"):
        save_tiny(name)
    save_tiny("recurrent", "mamba")
    tokenizer = AutoTokenizer.from_pretrained("foreign")
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained("foreign")
    byte_tokenizer("{{ style }}" + CHATML).save_pretrained("styled")
    Path("plain/chat_template.jinja").unlink()
    _without_a_stop(Path("endless"))
    tied = tiny_model("qwen2")
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.save_pretrained("tied")
    byte_tokenizer().save_pretrained("tied")


def _without_a_stop(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text())
            left = {k: v for k, v in settings.items() if k not in ("eos_token_id", "eos_token")}
            (folder / name).write_text(json.dumps(left))


@pytest.mark.parametrize("pain", PAINS)
def test_a_mistake_gets_its_message(pain: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = PAINS[pain]
    _models()
    if pain in NEEDS_RUN:
        assert train("done", "--steps", "1") == 0
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    assert train("run", *shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("run/model").exists()


def test_names_of_other_programs_lead_to_a_key_and_are_none_here() -> None:
    assert set(ELSEWHERE) <= set(keys())
    assert all(len(names) == len(set(names)) for names in ELSEWHERE.values())
    listed = {name for names in ELSEWHERE.values() for name in names}
    assert [name for name in listed if candidates(name)] == []


def test_a_model_without_rows_that_can_be_used_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("pairs.jsonl", [PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}])
    assert train("run") == 2
    assert "identical_responses" in capsys.readouterr().err
