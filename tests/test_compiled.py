"""Layers through torch.compile: the same numbers as the layers as they were written, or none."""

from __future__ import annotations

import shutil

import pytest
import torch

import upweight.models.compiled as compiled
from oracles import gradients, loaded, random_trees, weigh
from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.models.adapter import add_lora
from upweight.models.compiled import can_compile, compile_layers, is_compiled, pays_back
from upweight.models.load import LanguageModel, checkpoint_layers
from upweight.models.logprobs import token_logps
from upweight.models.sample import sample

needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
TREES = random_trees([(6, 3, 5), (40, 20, 20, 4), (5, 7, 1)], seed=7)


def learned(lm: LanguageModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of a forest, and all gradients of a weighted sum of them."""
    logps = token_logps(lm, collate(TREES))
    return logps.detach(), gradients(lm.model, weigh(logps))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("change", ["lora", "recomputed"])
def test_compiled_layers_give_the_log_probs_and_gradients_of_the_layers_as_written(change):
    lm = loaded("llama")
    if change == "lora":
        lm = add_lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    if change == "recomputed":
        checkpoint_layers(lm)
    logps, slopes = learned(lm)
    compile_layers(lm)
    assert is_compiled(lm)
    found, theirs = learned(lm)
    torch.testing.assert_close(found, logps, rtol=1e-5, atol=1e-5)
    assert theirs.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert (theirs[name] - slope).norm() <= 1e-4 * slope.norm() + 1e-7, name


@needs_compiler
@pytest.mark.slow
def test_answers_are_drawn_by_the_layers_as_written():
    """Token by token from a cache that grows, compiled layers would be compiled anew and anew."""
    lm = loaded("llama")
    before = sample(lm, [[5, 6, 7]], num=2, max_new_tokens=5)
    compile_layers(lm)
    torch._dynamo.utils.counters.clear()
    assert sample(lm, [[5, 6, 7]], num=2, max_new_tokens=5) == before
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def plain(monkeypatch, wrong=None):
    """As a compiler that gives back what it is given, or what is wrong with it."""

    def compile_layer(layer, **_):
        forward = layer._call_impl
        layer._compiled_call_impl = (lambda *a, **k: wrong(forward(*a, **k))) if wrong else forward

    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)


@pytest.mark.parametrize(
    "wrong", [lambda x: x * 1.01, lambda x: x.roll(1, 1), lambda x: x.detach()],
    ids=["scaled", "shifted", "without its gradient"],
)  # fmt: skip
def test_layers_that_give_something_else_compiled_are_refused_and_left_as_they_were(
    wrong, monkeypatch
):
    lm = loaded("llama")
    before = learned(lm)[0]
    plain(monkeypatch, wrong)
    with pytest.raises(ModelError, match=r"cannot be compiled here \(.*compile=false"):
        compile_layers(lm)
    assert not is_compiled(lm)
    assert torch.equal(learned(lm)[0], before)


def test_a_compiler_that_fails_is_named_and_the_layers_are_left_as_they_were(monkeypatch):
    lm = loaded("llama")

    def fails(x):
        raise RuntimeError("no compiler\nand more")

    plain(monkeypatch, fails)
    with pytest.raises(ModelError, match=r"\(RuntimeError: no compiler\).*C\+\+ compiler"):
        compile_layers(lm)
    assert not is_compiled(lm)


def test_a_family_that_runs_unshared_has_nothing_that_is_compiled():
    with pytest.raises(ModelError, match="has nothing that is compiled: .*recurrent"):
        compile_layers(loaded("mamba"))


def test_a_run_is_compiled_for_by_its_size_alone(monkeypatch):
    lm = loaded("llama")
    weights = sum(p.numel() for p in lm.causal.base_model.parameters())
    enough = compiled.OPERATIONS / (6 * weights)
    assert pays_back(lm, 1.01 * enough) and not pays_back(lm, 0.99 * enough)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile()
