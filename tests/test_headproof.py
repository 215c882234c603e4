import pytest
import torch
from torch import nn

from oracles import loaded, with_plan
from test_head import CHANGES, as_on_cuda, in_fp32
from tiny import save_tiny
from upweight.models import head
from upweight.models.head import head_logps, kept_bytes
from upweight.models.headproof import head_is_right
from upweight.models.load import load


def of_words(num, common=0.0, change=None):
    """A model whose head has so many words, which have something in common."""
    lm = loaded()
    lm.compute_dtype = torch.bfloat16
    new = nn.Linear(32, num, bias="bias" in (change or {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        new.weight.copy_(torch.randn(num, 32, generator=generator) * 0.1)
        new.weight.add_(common)
    lm.causal.set_output_embeddings(new)
    for key, value in (change or {}).items():
        if key != "bias":
            setattr(lm.causal.config, key, value)
    return lm


@pytest.mark.parametrize("num", [260, 1061, 5000])
@pytest.mark.parametrize("common", [0.0, 0.3])
@pytest.mark.parametrize("change", [None, *CHANGES.values()], ids=["plain", *CHANGES])
@pytest.mark.parametrize("cuda", [False, True])
def test_a_head_that_is_right_is_taken_in_the_compute_dtype(monkeypatch, num, common, change, cuda):
    if cuda:
        as_on_cuda(monkeypatch, in_fp32)
        monkeypatch.setattr(head, "WAITING_DEVICES", {"cpu"})
    lm = of_words(num, common, change)
    before = [p.requires_grad for p in lm.model.parameters()]
    assert head_is_right(lm)
    assert [p.requires_grad for p in lm.model.parameters()] == before
    assert all(p.grad is None for p in lm.model.parameters())


row_sums, exponentials, subtract = head._row_sums, head._exponentials, head._subtract_product


def without_the_blocks(e, block=512):
    return e[:, e.shape[1] // block * block :].float().sum(-1)


def without_the_tail(e, block=512):
    return row_sums(e[:, : e.shape[1] // block * block], block)


def never_shifted(h, w, y, bias, cap):
    z = (h @ w.T).float()
    z -= z.gather(1, y[:, None])
    e = z.exp().scatter_(1, y[:, None], 0.0)
    rest = e.sum(-1)
    return e.to(h.dtype), 1 + rest, rest, -torch.log1p(rest)


def the_last_chunk_alone(total, a, b):
    total.copy_(-(a @ b))


def added_for_subtracted(total, a, b):
    subtract(total, a, -b)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("_row_sums", without_the_blocks),
        ("_row_sums", without_the_tail),
        ("_exponentials", never_shifted),
        ("_subtract_product", the_last_chunk_alone),
        ("_subtract_product", added_for_subtracted),
    ],
)
def test_a_head_that_is_wrong_in_half_precision_is_found(monkeypatch, name, plant):
    lm = of_words(49152)
    monkeypatch.setattr(head, name, plant)
    assert not head_is_right(lm)
    # What trains in fp32 goes another way, which is proved with the whole model.
    lm.compute_dtype = torch.float32
    assert head_is_right(lm)


def test_a_head_that_is_wrong_in_half_precision_is_read_in_fp32(tmp_path, monkeypatch):
    folder = save_tiny(str(tmp_path), "llama")
    assert load(folder, device="cpu", dtype="bfloat16").plan.one_pass
    monkeypatch.setattr(head, "_exponentials", never_shifted)
    assert load(folder, device="cpu", dtype="float32").plan.one_pass
    monkeypatch.setattr("upweight.models.proof.head_is_right", lambda lm: False)
    lm = load(folder, device="cpu", dtype="bfloat16")
    assert lm.plan.shared and not lm.plan.one_pass and "in fp32" in lm.plan.describe()
    monkeypatch.delattr(head, "_exponentials")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 32, generator=generator)
    targets = torch.tensor([1, 2, 3])
    weight = lm.causal.get_output_embeddings().weight
    wanted = (hidden @ weight.T).log_softmax(-1)[[0, 1, 2], targets]
    torch.testing.assert_close(head_logps(lm, hidden, targets), wanted)
    assert kept_bytes(lm) == (0, None) != kept_bytes(with_plan(lm))
