"""Activations in host memory until the backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import upweight.models.offload as offload
from oracles import loaded, random_trees
from upweight.config import load_run
from upweight.data.pack import collate
from upweight.errors import Refusal
from upweight.losses.pair import dpo
from upweight.models.adapter import add_lora
from upweight.models.load import checkpoint_layers, fingerprint
from upweight.models.logprobs import token_logps
from upweight.models.reference import fill, open_reference
from upweight.recipes.screen import Silent
from upweight.recipes.start import start
from upweight.training import memory
from upweight.training.loop import Hooks, Plan, Progress, fit
from upweight.training.memory import plan_memory
from upweight.training.objectives import pair
from upweight.training.optimizer import make_optimizer

TREES = random_trees([(6, 3, 5), (40, 20, 20, 4), (5, 7, 1), (30, 40, 6)], seed=7)


@pytest.fixture
def packed(monkeypatch):
    """What goes to host memory: (numbers, pinned) of each tensor, however small."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    seen = []
    kept = torch.autograd.graph.save_on_cpu

    class Noted(kept):
        def __init__(self, pin_memory=False, device_type="cuda"):
            super().__init__(pin_memory, device_type)
            pack = self.pack_hook

            def noted(tensor):
                seen.append((tensor.untyped_storage().data_ptr(), tensor.numel(), pin_memory))
                device, copy = pack(tensor)
                return device, copy.clone()  # on a CPU it would be the tensor itself

            self.pack_hook = noted

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Noted)
    return seen


def steps(lm, root):
    """Weights and records of two training steps, bin by bin."""
    reference = open_reference(fingerprint(lm), lm, root)
    fill(reference, lm, TREES, 64)
    optimizer = make_optimizer(
        lm.model, learning_rate=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-3
    )
    records = []
    hooks = Hooks(records.append, lambda progress: False, lambda progress: None)
    plan = Plan(2, 2, 1e-2, 0.0, "constant", 1.0)
    forests = [collate(TREES[:2]), collate(TREES[2:])]
    fit(
        lm, optimizer, pair(reference.logps, dpo, beta=0.1), lambda step: forests, plan, hooks,
        Progress(),
    )  # fmt: skip
    found = [(r["loss"], r["grad_norm"]) for r in records]
    return found, {n: p.detach() for n, p in lm.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_training_steps_are_the_same_to_the_bit(tmp_path, packed, lora, recomputed):
    def made():
        lm = loaded()
        if lora:
            lm = add_lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
        if recomputed:
            checkpoint_layers(lm)
        return lm

    wanted, weights = steps(made(), tmp_path / "a")
    assert not packed
    lm = replace(made(), offload=True)
    found, moved = steps(lm, tmp_path / "b")
    assert found == wanted and all(torch.equal(moved[name], weights[name]) for name in weights)
    at = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    assert packed and not any(where in at for where, *_ in packed)


def test_copies_of_weights_in_the_dtype_of_products_stay_too(packed):
    lm = replace(loaded(), offload=True, compute_dtype=torch.bfloat16)
    sizes = {p.numel() for p in lm.model.parameters() if p.dim() == 2}
    with offload.offloaded(lm):
        token_logps(lm, collate(TREES))
    assert packed and not sizes.intersection(num for _, num, _ in packed)


def test_recomputed_layers_move_what_they_begin_with(packed):
    counts = []
    for recomputed in (False, True):
        lm = replace(loaded(), offload=True)
        if recomputed:
            checkpoint_layers(lm)
        packed.clear()
        with offload.offloaded(lm):
            token_logps(lm, collate(TREES))
        counts.append(sum(num for _, num, _ in packed))
    # Two layers' inputs of 32 numbers a token, and what final norm and head keep.
    tokens = sum(tree.num_tokens for tree in TREES)
    assert 2 * 32 * tokens < counts[1] < counts[0] / 2


def test_memory_is_pinned_for_a_gpu_and_small_tensors_stay(packed, monkeypatch):
    lm = replace(loaded(), offload=True)
    x = torch.ones(100, requires_grad=True)
    for device, pinned in (("cpu", False), ("cuda", True)):
        packed.clear()
        with offload.offloaded(replace(lm, device=torch.device(device))):
            y = x.exp()
        assert [pin for *_, pin in packed] == [pinned]
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], x.exp())
    packed.clear()
    monkeypatch.setattr(offload, "SMALLEST", 101)
    with offload.offloaded(lm):
        x.exp()
    with offload.offloaded(replace(lm, offload=False)):
        x.repeat(9).exp()
    assert not packed


def test_a_plan_counts_what_waits_in_host_memory(monkeypatch):
    lm = loaded()
    trees, numbers = TREES, [range(len(TREES))]
    whole = plan_memory(lm, trees, numbers)
    moved = plan_memory(replace(lm, offload=True), trees, numbers)
    # Of two layers one is on the device at a time.
    assert moved.per_token == whole.per_token // 2
    assert moved.host_per_token >= whole.per_token
    assert "activations in host memory" in moved.describe() and "host" not in whole.describe()
    room = int(1000 * moved.host_per_token / memory.SHARE) + 1
    free = moved.free
    both = iter([free, room])
    monkeypatch.setattr(memory, "free_bytes", lambda device: next(both))
    assert plan_memory(replace(lm, offload=True), trees, numbers).tokens_per_bin == 768


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_on_a_cpu_the_key_is_refused_with_what_to_do(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = {"model": "none", "data": "none.jsonl", "device": device, "compute.offload": True}
    with pytest.raises(Refusal, match="compute.offload is true, and .* the CPU.*Leave it out"):
        start(load_run(None, values=said), Silent())
