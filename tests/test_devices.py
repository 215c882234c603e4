"""What is done for a device other than the CPU, as far as a machine without one can tell."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

import upweight.recipes.online as online
from oracles import SHAPES, loaded, random_trees
from tiny import save_tiny, tiny_model
from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.models.frozen import Frozen
from upweight.models.load import bfloat16_is_fast, load
from upweight.models.varlen import varlen_plan
from upweight.training.objectives import pair_metrics
from upweight.types import PairLogps


def test_a_renewed_reference_is_read_back_to_the_device_that_it_was_on(tmp_path, monkeypatch):
    asked = []
    read = online.load_file

    def load_file(file, device="cpu"):
        asked.append(device)
        return read(file)

    monkeypatch.setattr(online, "load_file", load_file)
    lm = loaded()
    drawn = online.Reference(None, Frozen(), tmp_path, 1, "cuda:1")
    with drawn.in_round(lm, 2):
        again = online.Reference(None, Frozen(), tmp_path, 1, "cuda:1")
        again.go_back(2, True)
    assert asked == ["cuda:1"]
    for name, kept in drawn.frozen.weights.items():
        assert torch.equal(again.frozen.weights[name], kept)


def test_bf16_that_a_gpu_emulates_is_not_taken_for_fast(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not bfloat16_is_fast(torch.device("cuda"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_weights_that_do_not_fit_on_the_device_are_refused_with_what_they_take(
    tmp_path, monkeypatch, error
):
    def full(model, device):
        raise error("Tried to allocate 2.00 MiB.\nMore about it")

    model = tiny_model()
    monkeypatch.setattr(type(model), "to", full)
    takes = sum(p.nbytes for p in model.parameters()) / 2**30
    with pytest.raises(ModelError, match="does not fit into the memory of cpu") as refused:
        load(save_tiny(str(tmp_path)), device="cpu", weights=model)
    said = str(refused.value)
    assert f" {takes:.3g} GiB (Tried to allocate 2.00 MiB.). " in said and "smaller model" in said


def test_a_forest_is_sent_to_a_gpu_without_waiting_for_it(monkeypatch):
    pinned, asked = [], []

    def pin_memory(tensor):
        pinned.append(id(tensor))
        return tensor

    def to(tensor, device, non_blocking=False):
        asked.append((id(tensor), str(device), non_blocking))
        return tensor

    forest = collate(random_trees(SHAPES))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    forest.to("cuda:1")
    varlen_plan(forest.spans, "cuda:1")
    # A forest's own, and a plan's: keys, two kinds of offsets, places for each of four responses.
    assert len(pinned) == 11 + 3 + 4 and asked == [(i, "cuda:1", True) for i in pinned]
    forest.to("cpu")
    assert len(pinned) == 18 and {row[1:] for row in asked[18:]} == {("cpu", False)}


class Called(TorchFunctionMode):
    """What of torch is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_the_counts_of_metrics_are_not_copied_to_the_device():
    # torch.tensor(number, device=gpu) is made on the host, and its copy waits for what runs there.
    values = [torch.zeros(3, device="meta") for _ in range(4)]
    counts = [torch.zeros(3, dtype=torch.long, device="meta") for _ in range(2)]
    with Called() as called:
        metrics = pair_metrics(PairLogps(*values, *counts), 0.1)
    assert called.seen and torch.tensor not in called.seen
    assert all(x.is_meta for pair in metrics.values() for x in pair)
