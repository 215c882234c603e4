"""Adapted layers as one function: peft's own forward is the oracle, in float64."""

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

import upweight.models.lowrank as lowrank
from oracles import SHAPES, as_peft_has_it, gradients, loaded, random_trees, relative, weigh
from upweight.data.pack import collate
from upweight.models.adapter import adapter_off, add_lora
from upweight.models.logprobs import token_logps
from upweight.models.lowrank import FusedLinear, adapted_product

FOREST = collate(random_trees(SHAPES))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def given(bias: bool = True):
    torch.manual_seed(0)
    weight, added = drawn(5, 4).detach(), drawn(5).detach() if bias else None
    return drawn(2, 3, 4), weight, added, drawn(2, 4), drawn(5, 2), 1.5


def adapted(family="llama", dropout=0.0, dtype=torch.float64):
    """With an adapter that says something."""
    lm = loaded(family)
    lm.model.to(dtype)
    lm = add_lora(lm, rank=4, alpha=6.0, dropout=dropout, targets="all-linear", seed=0)
    torch.manual_seed(0)
    for name, parameter in lm.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return lm


def fused(lm) -> list[nn.Module]:
    return [module for module in lm.model.modules() if isinstance(module, FusedLinear)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_formula(bias):
    x, weight, added, a, b, scaling = given(bias)
    formula = x @ (weight + scaling * b @ a).T + (0 if added is None else added)
    torch.testing.assert_close(adapted_product(x, weight, added, a, b, scaling), formula)


def test_the_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(adapted_product, given())


def scaling_lost(grads):
    of_x, *rest, of_b, none = grads
    return of_x, *rest, of_b / 1.5, none


def factors_swapped(grads):
    of_x, *rest, of_a, of_b, none = grads
    return of_x, *rest, of_b.T[:, :4].contiguous(), of_a.T.repeat(2, 1)[:5].contiguous(), none


@pytest.mark.parametrize("planted", [scaling_lost, factors_swapped])
def test_a_planted_error_in_a_gradient_shows(planted, monkeypatch):
    right = lowrank._Adapted.backward
    wrong = staticmethod(lambda ctx, *grads: planted(right(ctx, *grads)))
    monkeypatch.setattr(lowrank._Adapted, "backward", wrong)
    assert not torch.autograd.gradcheck(adapted_product, given(), raise_exception=False)


def test_a_gradient_that_forgets_the_adapter_shows(monkeypatch):
    right = lowrank._Adapted.backward

    def forgetful(ctx, slope):
        weight = ctx.saved_tensors[2]
        return slope @ weight, *right(ctx, slope)[1:]

    monkeypatch.setattr(lowrank._Adapted, "backward", staticmethod(forgetful))
    assert not torch.autograd.gradcheck(adapted_product, given(), raise_exception=False)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (2, 0, 3)])
def test_no_rows_are_no_rows(shape):
    _, *rest = given()
    x = drawn(*shape, 4)
    out = adapted_product(x, *rest)
    assert out.shape == (*shape, 5)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt_neox"])
def test_a_model_is_the_same_with_fused_adapters_and_as_peft_has_it(family):
    ours, theirs = adapted(family), as_peft_has_it(adapted(family))
    assert fused(ours) and not fused(theirs)
    one, other = (token_logps(lm, FOREST) for lm in (ours, theirs))
    torch.testing.assert_close(one, other)
    slopes = [gradients(lm.model, weigh(logps)) for lm, logps in ((ours, one), (theirs, other))]
    assert any(slope.any() for slope in slopes[0].values()) and relative(*slopes) < 1e-9
    with adapter_off(ours) as left, adapter_off(theirs) as right:
        assert torch.equal(token_logps(left, FOREST), token_logps(right, FOREST))


def test_in_bf16_it_is_at_least_as_near_as_peft_s_own(monkeypatch):
    exact = as_peft_has_it(adapted())
    wanted = token_logps(exact, FOREST)
    off, called = [], []
    own = lowrank.adapted_product
    monkeypatch.setattr(
        lowrank, "adapted_product", lambda *given: called.append(given[0].dtype) or own(*given)
    )
    for change in (lambda lm: lm, as_peft_has_it):
        lm = change(adapted(dtype=torch.float32))
        lm.compute_dtype = torch.bfloat16
        off.append((token_logps(lm, FOREST).double() - wanted).abs().mean().item())
    assert set(called) == {torch.bfloat16} and len(called) == len(fused(adapted()))
    # One rounding of the sum in place of three; the rest of the model rounds as much as before.
    assert off[0] <= 1.1 * off[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_not_of_the_plain_kind_is_left_to_peft(family, monkeypatch):
    called = []
    monkeypatch.setattr(lowrank, "adapted_product", lambda *given: called.append(given))
    lm = adapted(family, dropout=0.5 if family == "llama" else 0.0)
    before = token_logps(lm, FOREST)
    assert before.isfinite().all() and not called


def test_merged_layers_and_two_adapters_are_left_to_peft(monkeypatch):
    lm = adapted()
    wanted = token_logps(lm, FOREST)
    called = []
    monkeypatch.setattr(lowrank, "adapted_product", lambda *given: called.append(given))
    layers = [module for module in lm.model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(token_logps(lm, FOREST), wanted)
    for layer in layers:
        layer.unmerge()
    lm.model.add_adapter("second", lm.model.peft_config["default"])
    lm.model.base_model.set_adapter(["default", "second"])
    lm.model.to(torch.float64)
    assert not called and token_logps(lm, FOREST).isfinite().all()
    assert not called
