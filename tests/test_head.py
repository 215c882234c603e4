from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oracles import gradients, loaded, relative
from upweight.models import head
from upweight.models.head import head_logps, kept_bytes

TARGETS = torch.tensor([0, 5, 7, 5, 9, 259, 100, 3])


def dense(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The whole logits tensor, its log-softmax, the targets' column."""
    return (hidden @ weight.T).log_softmax(-1)[torch.arange(len(TARGETS)), TARGETS]


def case(dtype: torch.dtype, scale: float = 1.0):
    lm = loaded(dtype=dtype)
    weight = lm.causal.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(8, 32, generator=generator, dtype=torch.float64)
    slope = torch.randn(8, generator=generator, dtype=torch.float64)
    return lm, weight, hidden.to(dtype).requires_grad_(), slope


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("kept", [0, 3, 100])
def test_one_pass_equals_the_dense_head_in_value_and_gradients(rows: int, kept: int):
    lm, weight, hidden, slope = case(torch.float64)
    got = head_logps(lm, hidden, TARGETS, rows * 260, kept * 260)
    wanted = dense(weight, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((slope * got).sum(), (hidden, weight))
    theirs = torch.autograd.grad((slope * wanted).sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_frozen_head_gives_the_same_gradient_of_the_hidden_states():
    lm, weight, hidden, slope = case(torch.float64)
    weight.requires_grad_(False)
    got = head_logps(lm, hidden, TARGETS, 3 * 260)
    (ours,) = torch.autograd.grad((slope * got).sum(), hidden)
    (theirs,) = torch.autograd.grad((slope * dense(weight, hidden)).sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_kept_for_the_backward_pass_is_counted_and_let_go(dtype: torch.dtype, frozen: bool):
    lm, weight, hidden, slope = case(torch.float64 if dtype == torch.float64 else torch.float32)
    lm.compute_dtype = dtype
    weight.requires_grad_(not frozen)
    got = head_logps(lm, hidden, TARGETS, 3 * 260)
    kept = got.grad_fn.kept
    assert sum(piece.nbytes for piece in kept) == len(TARGETS) * kept_bytes(lm)[0]
    (slope * got).sum().backward()
    assert kept == [None] * 3


def test_no_more_is_kept_than_is_said_to_be_the_most():
    lm, _, hidden, _ = case(torch.float32)
    limit = 5 * 260
    kept = head_logps(lm, hidden, TARGETS, 260, limit).grad_fn.kept
    assert sum(piece.nbytes for piece in kept if piece is not None) == kept_bytes(lm, limit)[1]


@pytest.mark.parametrize(("scale", "common"), [(1.0, 0.0), (30.0, 0.0), (400.0, 0.0), (1.0, 64.0)])
def test_in_bf16_a_log_prob_is_accurate_relative_to_itself(scale: float, common: float):
    # A bf16 number has 8 significant bits, so rounding z - z_y moves it by at most 2^-8 of itself,
    # which where the mass is is at most |log p| + ln V; rounding the exponentials adds 2^-8. What
    # all logits have in common (here 64 * 8, whose own rounding would be 2 nats) adds nothing.
    lm, weight, hidden, slope = case(torch.float32, scale)
    with torch.no_grad():
        weight[:, 0], hidden[:, 0] = common, 8.0
    lm.compute_dtype = torch.bfloat16
    got = head_logps(lm, hidden, TARGETS, 3 * 260)
    rounded = weight.bfloat16().double(), hidden.bfloat16().double()
    wanted = dense(*rounded)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert wanted.min() < -2 * scale
    bound = 2**-8 * (wanted.abs() + torch.tensor(260.0).log() + 1) + 1e-5
    assert ((got - wanted).abs() <= bound).all()
    if (scale, common) != (1.0, 0.0):
        # A target at e^-70 blurs the tokens that it lost to, and W[y] - E W / S cancels what all
        # rows of W have in common: gradients are bf16's, no better.
        return
    ours = torch.autograd.grad((slope.float() * got).sum(), (hidden, weight))
    w, h = (x.detach().requires_grad_() for x in rounded)
    theirs = torch.autograd.grad((slope * dense(w, h)).sum(), (h, w))
    for mine, exact in zip(ours, theirs, strict=True):
        assert relative({"": mine}, {"": exact}) < 2e-2


def test_a_planted_error_in_the_gradient_shows(monkeypatch: pytest.MonkeyPatch):
    exponentials = head._exponentials

    def with_the_target_counted_twice(h, w, y, bias, cap):
        e, total, rest, logps = exponentials(h, w, y, bias, cap)
        return e.index_put((torch.arange(len(y)), y), total - rest), total, rest, logps

    lm, weight, hidden, slope = case(torch.float64)
    wanted = gradients(lm.model, (slope * dense(weight, hidden)).sum())
    for planted, off in ((exponentials, False), (with_the_target_counted_twice, True)):
        monkeypatch.setattr(head, "_exponentials", planted)
        got = gradients(lm.model, (slope * head_logps(lm, hidden, TARGETS)).sum())
        assert (relative(got, wanted) > 1e-6) == off


def test_a_nearly_certain_token_keeps_its_log_prob_in_bf16():
    # p = 1 - 1e-4: rounded to bf16 it would be 1, and its log 0.
    lm, weight, _, _ = case(torch.float32)
    lm.compute_dtype = torch.bfloat16
    hidden = (30 * weight[TARGETS] / weight[TARGETS].norm(dim=1, keepdim=True) ** 2).detach()
    got = head_logps(lm, hidden, TARGETS)
    wanted = dense(weight.bfloat16().double(), hidden.bfloat16().double())
    assert (wanted > -1e-2).all() and (wanted < -1e-9).all()
    torch.testing.assert_close(got.double(), wanted, rtol=0.1, atol=0.0)


CHANGES = {
    "bias": dict(bias=True),
    "cap": dict(final_logit_softcapping=2.0),
    "cap and bias": dict(final_logit_softcapping=2.0, bias=True),
    "factor": dict(logit_scale=0.3),
    "divisor and bias": dict(logits_scaling=3.0, bias=True),
}


def changed(change: dict, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    """A model whose family changes its logits, hidden states, what enters a dense head for them,
    and the logits that the family makes of it."""
    lm, weight, hidden, slope = case(dtype, scale)
    new = nn.Linear(32, 260, bias="bias" in change, dtype=dtype)
    new.weight = weight
    lm.causal.set_output_embeddings(new)
    given = [hidden, weight]
    if new.bias is not None:
        with torch.no_grad():
            new.bias.copy_(torch.linspace(-3, 2, 260)[torch.randperm(260)])
        given.append(new.bias)
    for key, value in change.items():
        if key != "bias":
            setattr(lm.causal.config, key, value)
    cap = change.get("final_logit_softcapping")

    def logps(h, w, b=None):
        raw = h @ w.T + (0 if b is None else b)
        raw = raw if cap is None else cap * torch.tanh(raw / cap)
        raw = raw * change.get("logit_scale", 1) / change.get("logits_scaling", 1)
        return raw.log_softmax(-1)[torch.arange(len(TARGETS)), TARGETS]

    return lm, given, slope, logps


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("rows", "kept"), [(1, 0), (3, 3), (100, 100)])
def test_what_families_do_to_their_logits_goes_through_the_one_pass(
    monkeypatch: pytest.MonkeyPatch, change: dict, rows: int, kept: int
):
    monkeypatch.delattr(head, "_adjusted_logps")
    lm, given, slope, logps = changed(change)
    got = head_logps(lm, given[0], TARGETS, 4 * rows * 260, kept * 260)
    torch.testing.assert_close(got, logps(*given), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((slope * got).sum(), given)
    theirs = torch.autograd.grad((slope * logps(*given)).sum(), given)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_frozen_head_of_such_a_family_gives_the_same_gradient(change: dict):
    lm, given, slope, logps = changed(change)
    hidden, *frozen = given
    for parameter in frozen:
        parameter.requires_grad_(False)
    got = head_logps(lm, hidden, TARGETS, 12 * 260)
    assert got.grad_fn.frozen
    (ours,) = torch.autograd.grad((slope * got).sum(), hidden)
    (theirs,) = torch.autograd.grad((slope * logps(*given)).sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_bias_is_trained_above_a_frozen_matrix():
    lm, given, slope, logps = changed(CHANGES["cap and bias"])
    given[1].requires_grad_(False)
    ours = torch.autograd.grad((slope * head_logps(lm, given[0], TARGETS)).sum(), given[2])
    theirs = torch.autograd.grad((slope * logps(*given)).sum(), given[2])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
@pytest.mark.parametrize("change", [CHANGES["bias"], dict(final_logit_softcapping=30.0, bias=True)])
def test_in_bf16_a_cap_moves_only_what_it_lets_through(change: dict, scale: float):
    # The product x_j - x_y is rounded by up to 2^-9 of itself, and the cap lets through what its
    # slope is there; all after that is fp32. To first order log p moves by the mean of that over
    # the tokens' probabilities: twice it is allowed.
    lm, given, slope, logps = changed(change, torch.float32, scale)
    lm.compute_dtype = torch.bfloat16
    got = head_logps(lm, given[0], TARGETS)
    h, w, b = (x.detach().double() for x in (given[0].bfloat16(), given[1].bfloat16(), given[2]))
    wanted = logps(h, w, b)
    raw = h @ w.T + b
    cap = change.get("final_logit_softcapping")
    steep = 1.0 if cap is None else 1 - torch.tanh(raw / cap) ** 2
    z = raw if cap is None else cap * torch.tanh(raw / cap)
    product = h @ w.T
    rounded = (product - product[torch.arange(8), TARGETS][:, None]).abs()
    moved = (z.softmax(-1) * steep * rounded).sum(-1)
    assert got.dtype == torch.float32
    assert ((got - wanted).abs() <= 2**-8 * moved + 1e-4).all()
    if scale == 1.0:
        ours = torch.autograd.grad((slope.float() * got).sum(), given)
        exact = [x.requires_grad_() for x in (h, w, b)]
        theirs = torch.autograd.grad((slope * logps(*exact)).sum(), exact)
        for mine, his in zip(ours, theirs, strict=True):
            assert relative({"": mine}, {"": his}) < 2e-2


def slopes_of_one(z, at_target, y, bias, cap):
    z, slopes, own = as_it_is(z, at_target, y, bias, cap)
    return z, torch.ones_like(slopes), own


def the_targets_slope_of_one(z, at_target, y, bias, cap):
    z, slopes, own = as_it_is(z, at_target, y, bias, cap)
    return z, slopes, torch.ones_like(own)


def the_bias_of_the_next_token(z, at_target, y, bias, cap):
    return as_it_is(z, at_target, y, bias.roll(1), cap)


def the_target_without_its_bias(z, at_target, y, bias, cap):
    return as_it_is(z, at_target - bias[y], y, bias, cap)


as_it_is = head._changed


@pytest.mark.parametrize(
    "plant",
    [
        slopes_of_one,
        the_targets_slope_of_one,
        the_bias_of_the_next_token,
        the_target_without_its_bias,
    ],
)
def test_a_planted_error_in_a_cap_or_a_bias_shows(monkeypatch: pytest.MonkeyPatch, plant):
    lm, given, slope, logps = changed(CHANGES["cap and bias"])
    theirs = torch.autograd.grad((slope * logps(*given)).sum(), given)
    for planted, off in ((as_it_is, False), (plant, True)):
        monkeypatch.setattr(head, "_changed", planted)
        ours = torch.autograd.grad((slope * head_logps(lm, given[0], TARGETS)).sum(), given)
        worst = max(relative({"": mine}, {"": his}) for mine, his in zip(ours, theirs, strict=True))
        assert (worst > 1e-3) == off


class TimesTwo(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_any_other_head_takes_the_general_way():
    lm, _, hidden, _ = case(torch.float64)
    other = TimesTwo(32, 260, dtype=torch.float64)
    lm.causal.set_output_embeddings(other)
    assert kept_bytes(lm) == (0, None)
    wanted = other(hidden).log_softmax(-1)[torch.arange(8), TARGETS]
    torch.testing.assert_close(head_logps(lm, hidden, TARGETS, 3 * 260), wanted)


def in_fp32(a, b, out_dtype):
    """torch.mm as CUDA has it: half-precision products, written in another dtype."""
    assert a.dtype == b.dtype == torch.bfloat16
    return plain_mm(a.to(out_dtype), b.to(out_dtype))


def rounded_first(a, b, out_dtype):
    return plain_mm(a, b).to(out_dtype)


def of_its_own(a, b, out_dtype):
    return plain_mm(a, b)


def not_taken(a, b, out_dtype):
    raise RuntimeError("mm is not implemented for this dtype")


def unknown(a, b):
    return plain_mm(a, b)


plain_mm = torch.mm


def as_on_cuda(monkeypatch: pytest.MonkeyPatch, mm) -> None:
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(head, "FP32_DEVICES", {"cpu"})
    monkeypatch.setattr(head, "_writes_fp32", cache(head._writes_fp32.__wrapped__))


@pytest.mark.parametrize(
    ("mm", "wide"),
    [
        (in_fp32, True),
        (rounded_first, False),
        (of_its_own, False),
        (not_taken, False),
        (unknown, False),
    ],
)
def test_fp32_products_are_used_where_a_trial_gives_them(monkeypatch, mm, wide: bool):
    # As above: the log-probs are then those of the rounded numbers, in fp32.
    lm, weight, hidden, slope = case(torch.float32)
    lm.compute_dtype = torch.bfloat16
    before = head_logps(lm, hidden, TARGETS, 3 * 260)
    as_on_cuda(monkeypatch, mm)
    assert head._writes_fp32("cpu", torch.bfloat16) == wide
    got = head_logps(lm, hidden, TARGETS, 3 * 260)
    w, h = (x.bfloat16().double().detach().requires_grad_() for x in (weight, hidden))
    exact = dense(w, h)
    if not wide:
        assert torch.equal(got, before)
        return
    assert (before - exact).abs().max() > 1e-4
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((slope.float() * got).sum(), (hidden, weight))
    theirs = torch.autograd.grad((slope * exact).sum(), (h, w))
    for mine, his in zip(ours, theirs, strict=True):
        assert relative({"": mine}, {"": his}) < 1e-2


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("frozen", [True, False])
def test_fp32_products_go_through_every_change_of_logits(monkeypatch, change: dict, frozen: bool):
    as_on_cuda(monkeypatch, in_fp32)
    lm, given, slope, logps = changed(change, torch.float32)
    lm.compute_dtype = torch.bfloat16
    for parameter in given[1:]:
        parameter.requires_grad_(not frozen)
    got = head_logps(lm, given[0], TARGETS, 12 * 260)
    factor = change.get("logit_scale", 1) / change.get("logits_scaling", 1)
    # A factor goes along with the hidden states, before they are rounded.
    states = (given[0] * factor).bfloat16().double() / factor
    exact = [x.detach().double() for x in (states, given[1].bfloat16(), *given[2:])]
    wanted = logps(*[x.requires_grad_() for x in exact])
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    leaves = given[:1] if frozen else given
    ours = torch.autograd.grad((slope.float() * got).sum(), leaves)
    theirs = torch.autograd.grad((slope * wanted).sum(), exact[: len(leaves)])
    for mine, his in zip(ours, theirs, strict=True):
        assert relative({"": mine}, {"": his}) < 1e-2


def test_products_in_full_precision_are_what_they_were(monkeypatch):
    as_on_cuda(monkeypatch, not_taken)
    for dtype in (torch.float32, torch.float64):
        assert not head._writes_fp32("cpu", dtype)
    assert not head._writes_fp32("mps", torch.bfloat16)


def adds(product):
    """torch.addmm as CUDA has it: fp32 and half-precision products of it, by `product`."""

    def addmm(total, a, b, out_dtype=None, alpha=1, out=None):
        if out_dtype is None:
            return plain_addmm(total, a, b)
        assert out is total and total.dtype == out_dtype == torch.float32
        return product(total, a, b, alpha)

    return addmm


def in_place(total, a, b, alpha):
    added.append(len(a))
    return total.add_(plain_mm(a.float(), b.float()), alpha=alpha)


def over_it(total, a, b, alpha):
    return total.copy_(alpha * plain_mm(a.float(), b.float()))


def rounded_before(total, a, b, alpha):
    return total.add_(plain_mm(a, b), alpha=alpha)


def not_added(total, a, b, alpha):
    raise RuntimeError("self and mat2 must have the same dtype")


plain_addmm = torch.addmm
added: list[int] = []


@pytest.mark.parametrize(
    ("product", "wide"),
    [(in_place, True), (over_it, False), (rounded_before, False), (not_added, False)],
)
def test_the_weights_gradient_is_summed_in_fp32_where_a_trial_does_so(monkeypatch, product, wide):
    # Three chunks of three rows. In the device's fp32 only what enters the products is rounded:
    # e to bf16, by 2^-9 of itself on the mean; a product of each chunk rounded as well adds as much
    # again.
    as_on_cuda(monkeypatch, in_fp32)
    monkeypatch.setattr(torch, "addmm", adds(product))
    monkeypatch.setattr(head, "_adds_fp32", cache(head._adds_fp32.__wrapped__))
    assert head._adds_fp32("cpu", torch.bfloat16) == wide
    assert not head._adds_fp32("cpu", torch.float32)
    lm, weight, hidden, slope = case(torch.float32)
    lm.compute_dtype = torch.bfloat16
    added.clear()
    got = head_logps(lm, hidden, TARGETS, 3 * 260)
    ours = torch.autograd.grad((slope.float() * got).sum(), (hidden, weight))
    assert added == ([260] * 3 if wide else [])
    w, h = (x.bfloat16().double().detach().requires_grad_() for x in (weight, hidden))
    theirs = torch.autograd.grad((slope * dense(w, h)).sum(), (h, w))
    for mine, exact in zip(ours, theirs, strict=True):
        assert relative({"": mine}, {"": exact}) < 5e-3


@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
@pytest.mark.parametrize("wide", [True, False])
def test_where_asking_waits_every_row_is_shifted_and_nothing_is_asked(monkeypatch, scale, wide):
    if wide:
        as_on_cuda(monkeypatch, in_fp32)
    monkeypatch.setattr(head, "WAITING_DEVICES", {"cpu"})
    lm, weight, hidden, slope = case(torch.float32, scale)
    # One row whose target is its largest logit, and is nearly certain: it is shifted by nothing.
    with torch.no_grad():
        hidden[0] = 30 * weight[0] / weight[0].norm() ** 2
    lm.compute_dtype = torch.bfloat16
    got = head_logps(lm, hidden, TARGETS, 3 * 260)
    rounded = (x.bfloat16().double().detach().requires_grad_() for x in (weight, hidden))
    wanted = dense(*rounded)
    assert -0.01 < wanted[0] < 0
    # As in bf16 above, and what is rounded is rounded once more when it is shifted.
    bound = 2**-7 * (wanted.abs() + torch.tensor(260.0).log() + 1) + 1e-5
    assert torch.isfinite(got).all() and ((got - wanted).abs() <= bound).all()
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0.1, atol=0.0)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    assert torch.equal(head_logps(lm, hidden, TARGETS, 3 * 260), got)


def test_a_shifted_row_is_the_same_row(monkeypatch):
    lm, weight, hidden, slope = case(torch.float64)
    monkeypatch.setattr(head, "WAITING_DEVICES", {"cpu"})
    got, wanted = head_logps(lm, hidden, TARGETS, 3 * 260), dense(weight, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((slope * got).sum(), (hidden, weight))
    theirs = torch.autograd.grad((slope * wanted).sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_row_longer_than_a_block_is_summed_whole():
    # Two blocks of 512 and 37 more, of about equal logits: each is a share of the sum, which the
    # roundings of its 1,061 words do not come near.
    weight = torch.randn(2 * 512 + 37, 32, generator=torch.Generator().manual_seed(1)) * 0.05
    hidden = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    got = head.linear_logps(
        hidden, weight, None, TARGETS, config=None, dtype=torch.bfloat16, cut=(3, 8)
    )
    wanted = dense(weight.bfloat16().double(), hidden.bfloat16().double())
    assert ((got - wanted).abs() < 4e-3).all()


@pytest.mark.parametrize(
    ("memory", "chunk", "kept"),
    [(8, 1 << 26, 1 << 29), (32, 1 << 27, 1 << 30), (80, 1 << 28, 5 << 29), (141, 1 << 28, None)],
)
def test_a_gpu_works_on_more_at_once_and_keeps_more(monkeypatch, memory, chunk, kept):
    asked = cache(head.elements.__wrapped__)
    found = SimpleNamespace(total_memory=memory << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    got = asked(torch.device("cuda", 0))
    assert got[0] == chunk and got[1] == (kept or memory << 25)
    assert asked(torch.device("cpu")) == (head.CHUNK_ELEMENTS, head.KEPT_ELEMENTS)
