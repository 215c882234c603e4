"""What is done for a device other than the CPU, as far as a machine without one can tell."""

from __future__ import annotations

import pytest
import torch

import upweight.recipes.online as online
from oracles import loaded
from tiny import save_tiny, tiny_model
from upweight.errors import ModelError
from upweight.models.frozen import Frozen
from upweight.models.load import bfloat16_is_fast, load


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
        again.go_back(2)
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
