"""No key without a say: each is changed in a run, and the run is seen to be another one or none."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import upweight.recipes.evaluation as run_evaluation
import upweight.recipes.reference as run_reference
from runs import PAIRS, plain_rows, rows_of, sentence, write_rows
from tiny import CHATML, byte_tokenizer, save_tiny
from upweight.config import load_run
from upweight.config.keys import keys
from upweight.errors import UpweightError
from upweight.models.sample import Sample
from upweight.recipes.train import train_model
from upweight.training import checkpoint
from upweight.trust.watch import seen
from upweight.trust.watch.seen import Seen

BASE: Mapping[str, Any] = {
    "model": "model", "data.path": "plain.jsonl", "out": "run", "steps": 2,
    "batch.pairs_per_step": 4, "optimizer.learning_rate": 1e-3, "compute.dtype": "float32",
    "checkpoint.every": 100,
}  # fmt: skip
TIMES = {"seconds", "tokens_per_second"}


@dataclass(frozen=True)
class Case:
    """Another value of a key, what of the run must then be another, and what it needs beside.

    `refused` are words of the error that the value may raise instead.
    """

    value: Any
    seen: str
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refused: str = ""


EVALUATED = {"evaluation.fraction": 0.3, "evaluation.samples": 2, "evaluation.max_new_tokens": 6}
MANY = {**EVALUATED, "evaluation.samples": 12}
LORA = {"lora": True}
CUT = {"data.max_length": 60, "data.truncation": "response", "preflight.cut": 0.99}
SAVED = {"checkpoint.every": 1, "checkpoint.keep": 2, "steps": 4}
WILD = {**EVALUATED, "optimizer.learning_rate": 1e-2, "loss.beta": 5.0, "steps": 8, "watch.kl": 1e9}

SFT = {"objective": "sft"}
ROUNDS = {
    "batch.pairs_per_step": None, "rollout.reward": "letters.py:score", "steps": 4,
    "rollout.prompts_per_round": 4, "rollout.max_tokens": 6, "rollout.passes": 2,
    "optimizer.learning_rate": 1e-2,
}  # fmt: skip
PPO = {**ROUNDS, "objective": "ppo"}
GRPO = {**ROUNDS, "objective": "grpo", "rollout.responses": 3}

CASES: dict[str, Case] = {
    "model": Case("other", "records"),
    "reference": Case("other", "records"),
    "out": Case("elsewhere", "where"),
    "objective": Case("ddpo", "records", refused="objective must be"),
    "epochs": Case(2.0, "records", {"steps": None, "data.limit": 8}),
    "steps": Case(3, "records"),
    "seed": Case(7, "records"),
    "resume": Case(True, "records", refused="resume"),
    "track": Case(["tensorboard"], "files", refused="tensorboard"),
    "log_every": Case(2, "records"),
    "data.path": Case(["pairs.jsonl"], "rows"),
    "data.format": Case("messages", "rows", refused="plain.jsonl:1"),
    "data.template": Case("none", "rows"),
    "data.template_options": Case({"style": "curt"}, "rows", {"model": "styled"}),
    "data.date": Case("2024-07-05", "rows", {"model": "dated"}),
    "data.max_length": Case(55, "rows", CUT),
    "data.truncation": Case("prompt", "rows", CUT),
    "data.pairing": Case("extremes", "rows", {"data.path": "scored.jsonl"}),
    "data.min_score_gap": Case(1.5, "rows", {"data.path": "scored.jsonl"}),
    "data.limit": Case(9, "rows"),
    "data.learn": Case("all", "rows", SFT),
    "data.turns": Case("all", "rows", {**SFT, "data.path": "talks.jsonl"}),
    "loss.beta": Case(0.5, "weights"),
    "loss.label_smoothing": Case(0.2, "weights"),
    "loss.margin": Case(0.5, "weights", {"objective": "reward", "data.path": "scored.jsonl"}),
    "loss.centering": Case(0.1, "weights", {"objective": "reward"}),
    "batch.pairs_per_step": Case(6, "records"),
    "batch.tokens_per_bin": Case(80, "layers"),
    "optimizer.learning_rate": Case(2e-3, "weights"),
    "optimizer.weight_decay": Case(0.1, "weights"),
    "optimizer.beta1": Case(0.5, "weights"),
    "optimizer.beta2": Case(0.9, "weights"),
    "optimizer.epsilon": Case(1e-2, "weights"),
    "optimizer.moments": Case("8bit", "weights"),
    "optimizer.max_grad_norm": Case(1e-3, "weights"),
    "optimizer.warmup": Case(0.9, "weights", {"steps": 4}),
    "optimizer.schedule": Case("cosine", "weights", {"steps": 4}),
    "lora": Case(True, "files"),
    "lora.rank": Case(2, "weights", LORA),
    "lora.alpha": Case(3.0, "weights", LORA),
    "lora.dropout": Case(0.3, "weights", LORA),
    "lora.targets": Case(["q_proj"], "weights", LORA),
    "lora.quantize": Case("nf4", "weights", LORA),
    "compute.dtype": Case("bfloat16", "weights"),
    "compute.device": Case("cuda", "environment", refused="no CUDA device"),
    "compute.attention": Case("dense", "environment"),
    "compute.sharing": Case(False, "layers"),
    "compute.threads": Case(2, "environment"),
    "compute.checkpointing": Case(True, "layers"),
    "compute.compile": Case(True, "environment"),
    "compute.offload": Case(True, "layers", refused="compute.offload"),
    "compute.trust_remote_code": Case(True, "records", {"model": "coded"}),
    "rollout.reward": Case("letters.py:more", "records", PPO),
    "rollout.prompts_per_round": Case(3, "records", PPO),
    "rollout.responses": Case(2, "records", GRPO),
    "rollout.max_tokens": Case(4, "records", PPO),
    "rollout.stop_penalty": Case(1.0, "records", PPO),
    "rollout.passes": Case(1, "records", PPO),
    "rollout.minibatches": Case(2, "records", PPO),
    "rollout.renew_reference": Case(1, "records", PPO),
    "rollout.server": Case(
        "http://127.0.0.1:1", "records", {**GRPO, **LORA}, refused="cannot be reached"
    ),
    "policy.clip_low": Case(1e-4, "records", PPO),
    "policy.clip_high": Case(1e-4, "records", PPO),
    "policy.kl_estimator": Case("k2", "records", PPO),
    "policy.advantages": Case("rloo", "records", GRPO),
    "policy.aggregation": Case("constant", "records", PPO),
    "policy.value": Case("shared", "records", PPO),
    "policy.value_coefficient": Case(0.5, "records", {**PPO, "policy.value": "shared"}),
    "policy.value_clip": Case(1e-3, "records", PPO),
    "policy.value_learning_rate": Case(0.5, "records", PPO),
    "policy.discount": Case(0.5, "records", PPO),
    "policy.trace": Case(0.5, "records", PPO),
    "policy.whiten": Case(False, "records", PPO),
    "policy.kl_target": Case(1.0, "records", PPO),
    "policy.kl_stop": Case(1e-9, "records", {**PPO, "rollout.passes": 4}),
    "evaluation.sets": Case({"held": ["held.jsonl"]}, "evaluations"),
    "evaluation.fraction": Case(0.4, "evaluations", EVALUATED),
    "evaluation.prompt_files": Case(["held.jsonl"], "evaluations", EVALUATED),
    "evaluation.every": Case(3, "evaluations", {**EVALUATED, "steps": 4}),
    "evaluation.samples": Case(1, "samples", EVALUATED),
    "evaluation.max_new_tokens": Case(3, "samples", EVALUATED),
    "evaluation.temperature": Case(0.0, "samples", EVALUATED),
    "evaluation.true_reward": Case("letters.py:score", "evaluations", EVALUATED),
    "checkpoint.every": Case(2, "files", SAVED),
    "checkpoint.keep": Case(1, "files", SAVED),
    # The same at every evaluation: the first one stays the best.
    "checkpoint.best": Case("reference_length", "files", {**EVALUATED, **SAVED}),
    "export.merge": Case(True, "files", LORA),
    "preflight.cut": Case(0.2, "findings", CUT, refused="preflight.cut"),
    "preflight.swapped": Case(0.99, "findings"),
    "preflight.identical": Case(0.9, "findings", {"data.path": "same.jsonl"}),
    "preflight.empty": Case(0.9, "findings", {"data.path": "empty.jsonl"}),
    "preflight.dropped": Case(0.9, "findings", {"data.path": "broken.jsonl"}),
    "preflight.contradictory": Case(0.9, "findings", {"data.path": "twice.jsonl"}),
    "preflight.repeated": Case(0.9, "findings", {"data.path": "twice.jsonl"}),
    "preflight.spans": Case(0.9, "findings", {"data.path": "stops.jsonl"}),
    "preflight.markers": Case(0.9, "findings", {"data.path": "marked.jsonl"}),
    "preflight.similar": Case(0.99, "findings", {"data.path": "alike.jsonl"}),
    "preflight.edits": Case(1e-4, "findings", {"data.path": "alike.jsonl"}),
    "preflight.shortcut": Case(0.99, "findings", {"data.path": "pairs.jsonl"}),
    "preflight.improbable": Case(0.0, "findings", {"data.path": "odd.jsonl"}),
    "preflight.reach": Case(1.0, "findings"),
    "watch.moved": Case(0.3, "findings", refused="nothing in layers.0 has moved"),
    "watch.patience": Case(1, "findings", PPO, refused="no answer so far earned more"),
    "watch.displaced": Case(9.0, "findings", {"steps": 9}),
    "watch.length": Case(9.0, "findings", MANY),
    "watch.repetition": Case(0.999, "findings", MANY),
    "watch.stopped": Case(0.0, "findings", MANY),
    "watch.solved": Case(0.5, "findings", {"steps": 9}),
    "watch.learned": Case(20.0, "findings", {"steps": 9, "watch.solved": 0.5}),
    "watch.known": Case(0.99, "findings", {**EVALUATED, "steps": 9}),
    "watch.easy": Case(0.0, "findings", {**EVALUATED, "data.path": "pairs.jsonl", "steps": 9}),
    "watch.spread": Case(1e-6, "findings", {"steps": 9}),
    "watch.flat": Case(1e6, "findings", {"steps": 32, "optimizer.learning_rate": 1e-5}),
    "watch.kl": Case(0.0, "findings", WILD),
    "watch.below": Case(0.9, "findings", MANY),
    "watch.suspect": Case(0.5, "suspects", {**EVALUATED, "steps": 6}),
}


@pytest.fixture(scope="module")
def _furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with models and rows, the current one for the whole module."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("keys")
        patched.setenv("UPWEIGHT_CACHE", str(folder / "cache"))
        patched.chdir(folder)
        for seed, name in enumerate(("model", "other", "styled", "coded", "dated")):
            save_tiny(name, seed=seed)
        byte_tokenizer("{{ style }}" + CHATML).save_pretrained("styled")
        byte_tokenizer("{{ strftime_now('%F') }}" + CHATML).save_pretrained("dated")
        _with_code_of_its_own(Path("coded"))
        write_rows("plain.jsonl", plain_rows(40))
        write_rows("pairs.jsonl", PAIRS)
        write_rows("held.jsonl", [r | {"prompt": f"held {r['prompt']}"} for r in plain_rows(9)])
        write_rows("scored.jsonl", _scored())
        rows = plain_rows(20)
        turned = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[:8]]
        write_rows("twice.jsonl", [*rows, *rows[:8], *turned])
        write_rows("same.jsonl", [*rows, *(r | {"rejected": r["chosen"]} for r in rows[:4])])
        write_rows("stops.jsonl", [*rows, *(r | {"chosen": "a <|im_end|>"} for r in rows[:15])])
        write_rows("marked.jsonl", [r | {"prompt": f"[INST] {r['prompt']}"} for r in rows])
        write_rows("empty.jsonl", [*rows, *(r | {"chosen": " "} for r in rows[:5])])
        write_rows("broken.jsonl", [*rows, *(r | {"chosen": "a \ud800"} for r in rows[:9])])
        long = "river stone cloud lamp paper seven green north salt wheel " * 2
        near = [r | {"chosen": f"{long}{i}", "rejected": f"{long}x"} for i, r in enumerate(rows)]
        write_rows("alike.jsonl", near)
        write_rows("odd.jsonl", [r | {"chosen": "~" * 9, "rejected": "^" * 9} for r in rows])
        write_rows("talks.jsonl", [{"messages": _talk(i)} for i in range(12)])
        functions = (
            "def score(prompt, response, row):\n    return sum(map(str.islower, response))\n"
        )
        functions += "def more(prompt, response, row):\n    return 2.0 * len(response)\n"
        Path("letters.py").write_text(functions)
        observed.cache_clear()
        yield


def _talk(number: int) -> list[dict[str, str]]:
    said = ("user", f"one {number}"), ("assistant", "two"), ("user", "three"), ("assistant", "four")
    return [{"role": role, "content": text} for role, text in said]


def _with_code_of_its_own(folder: Path) -> None:
    """A model whose config names Python code in its folder."""
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    written = config | {"model_type": "own_llama", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


def _scored() -> list[dict[str, Any]]:
    import random

    draw = random.Random(2)
    return [
        {
            "prompt": f"question {i}",
            "responses": [{"text": sentence(draw, 5), "score": s} for s in (0, 1, 2, 3)],
        }
        for i in range(12)
    ]


def _learned_by_heart(patched: pytest.MonkeyPatch) -> None:
    """Training that has told nearly all pairs apart, by making all responses improbable."""
    means = {"rewards/accuracies": 0.98, "loss": 0.001, "logratios/chosen": -30.0}
    patched.setattr(Seen, "mean", lambda self, key: means.get(key, 10.0))


def _short_answers(patched: pytest.MonkeyPatch) -> None:
    """A policy that says one token where its reference says six."""
    draw = run_evaluation.draw

    def short(*given: Any) -> list[Sample]:
        return [replace(s, tokens=s.tokens[:1]) for s in draw(*given)]

    patched.setattr(run_evaluation, "draw", short)


def _stuck_answers(patched: pytest.MonkeyPatch) -> None:
    """A policy that says one thing over and over."""
    draw = run_evaluation.draw

    def stuck(*given: Any) -> list[Sample]:
        return [replace(s, tokens=(40,) * 10) for s in draw(*given)]

    patched.setattr(run_evaluation, "draw", stuck)


def _endless_answers(patched: pytest.MonkeyPatch) -> None:
    """A policy that does not stop where its reference does."""
    draw = run_evaluation.draw

    def ended(*given: Any) -> list[Sample]:
        return [replace(s, stopped=True) for s in draw(*given)]

    patched.setattr(run_reference, "draw", ended)


def _hardly_moved(patched: pytest.MonkeyPatch) -> None:
    """Updates that most weights have not held, and a layer none of them."""
    patched.setattr(seen, "_share_moved", lambda before, after: (0.4, ["layers.0"]))


def _taught_late(patched: pytest.MonkeyPatch) -> None:
    """Answers of which none earns more than another, at the first step."""

    def remember(told: Seen, record: Mapping[str, float]) -> None:
        told.taught = record["step"] > 1

    patched.setattr(Seen, "remember", remember)


def _below_zero(patched: pytest.MonkeyPatch) -> None:
    """A sampled KL that no KL can be."""
    record = {"kl": -1.0, "kl_low": -1.5, "kl_high": -0.5}
    patched.setattr(run_evaluation.evaluate, "kl_record", lambda *given: record)


PLANTED: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "watch.moved": _hardly_moved,
    "watch.patience": _taught_late,
    "watch.learned": _learned_by_heart,
    "watch.known": _learned_by_heart,
    "watch.below": _below_zero,
    "watch.displaced": _learned_by_heart,
    "watch.length": _short_answers,
    "watch.repetition": _stuck_answers,
    "watch.stopped": _endless_answers,
    "watch.solved": _learned_by_heart,
}
"""What has to go wrong before these keys have a say."""


@functools.cache
def observed(said: str, planted: str = "") -> dict[str, Any]:
    """What a run is, from what it computes and writes; {"error": ...} where it is refused."""
    with pytest.MonkeyPatch.context() as patched:
        PLANTED.get(planted, lambda patched: None)(patched)
        return _observed(said)


def _observed(said: str) -> dict[str, Any]:
    values = json.loads(said)
    threads = torch.get_num_threads()
    layers: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module).__name__.endswith("MLP"):  # inside of what is recomputed
            layers.append(tuple(inputs[0].shape))

    watching_layers = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        result = train_model(load_run(None, values=values))
        return _of_run(result.out) | {"layers": layers, "where": str(result.out)}
    except UpweightError as error:
        return {"error": str(error)}
    finally:
        watching_layers.remove()
        torch.set_num_threads(threads)
        # What a run finds in the cache is another run's: each computes its own.
        for name in ("run", "elsewhere", "cache"):
            shutil.rmtree(name, ignore_errors=True)


def _of_run(out: Path) -> dict[str, Any]:
    records = [
        {k: v for k, v in record.items() if k not in TIMES}
        for record in rows_of(out / "metrics.jsonl")
    ]
    environment = json.loads((out / "environment.json").read_text())
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    samples, suspects = out / "samples.jsonl", out / "suspects.jsonl"
    weights = [f for f in out.glob("model/*.safetensors")]
    return {
        "records": [r for r in records if r["kind"] == "train"],
        "evaluations": [r for r in records if r["kind"] == "eval"],
        "findings": [
            *json.loads((out / "account.json").read_text())["findings"],
            *(r for r in records if r["kind"] == "warning"),
        ],
        "samples": rows_of(samples) if samples.exists() else [],
        "suspects": rows_of(suspects) if suspects.exists() else [],
        "rows": dict(checkpoint.load(newest).position.data_digests),
        "weights": [hashlib.sha256(f.read_bytes()).hexdigest() for f in weights],
        "environment": {
            k: environment[k] for k in ("cpu", "gpu", "dtype", "attention", "compiled")
        },
        "files": sorted(str(f.relative_to(out)) for f in out.rglob("*")),
    }


def run_with(values: Mapping[str, Any], planted: str = "") -> dict[str, Any]:
    said = {k: v for k, v in values.items() if v is not None}
    return observed(json.dumps(said, sort_keys=True), planted)


def refuses_or_differs(key: str, case: Case) -> str:
    """Why nothing shows that the key has a say, or ""."""
    planted = key if key in PLANTED else ""
    before = run_with({**BASE, **case.beside}, planted)
    after = run_with({**BASE, **case.beside, key: case.value}, planted)
    name = key.rpartition(".")[2]
    if "error" in before and name in before["error"] and name not in after.get("error", ""):
        return ""  # it permits what was refused
    if "error" in after:
        if case.refused and case.refused in after["error"]:
            return ""
        return f"refused in other words: {after['error']}"
    if "error" in before:
        return f"the run without it fails: {before['error']}"
    return "" if before[case.seen] != after[case.seen] else f"the same {case.seen}"


def test_every_key_has_a_case() -> None:
    assert list(CASES) == list(keys())


@pytest.mark.usefixtures("_furnished")
def test_a_run_is_the_same_run_when_nothing_changes() -> None:
    for beside in ({}, WILD):
        first = run_with(BASE | beside)
        observed.cache_clear()
        assert run_with(BASE | beside) == first and "error" not in first


@pytest.mark.slow
@pytest.mark.usefixtures("_furnished")
@pytest.mark.parametrize("key", CASES)
def test_another_value_is_another_run_or_an_error(key: str) -> None:
    assert refuses_or_differs(key, CASES[key]) == ""


@pytest.mark.usefixtures("_furnished")
def test_a_key_that_changes_nothing_is_found() -> None:
    idle = Case(100, "weights")
    assert refuses_or_differs("checkpoint.keep", idle) == "the same weights"
