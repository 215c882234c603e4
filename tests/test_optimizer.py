from __future__ import annotations

import math
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from tiny import tiny_model
from upweight.errors import ModelError
from upweight.training.checkpoint import capture, load, restore, save
from upweight.training.moment import Position
from upweight.training.optimizer import (
    clip,
    make_optimizer,
    require_moments,
    room_for_moments,
)

SETTINGS = dict(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6)


def adamw(start: torch.Tensor, gradients: list[torch.Tensor], weight_decay: float) -> torch.Tensor:
    """Algorithm 2 of Loshchilov and Hutter 2019, an update at a time in float64."""
    rate, b1, b2, epsilon = 0.01, 0.8, 0.95, 1e-6
    x, m, v = start.double(), torch.zeros_like(start.double()), torch.zeros_like(start.double())
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        unbiased_m, unbiased_v = m / (1 - b1**t), v / (1 - b2**t)
        x = x - rate * (unbiased_m / (unbiased_v.sqrt() + epsilon) + weight_decay * x)
    return x


def test_three_updates_are_adamw_with_decay_on_matrices_only() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: [torch.randn_like(p) for _ in range(3)] for name, p in start.items()}
    optimizer = make_optimizer(model, **SETTINGS)
    for i in range(3):
        for name, p in model.named_parameters():
            p.grad = gradients[name][i]
        optimizer.step()
    expected = adamw(start["weight"], gradients["weight"], weight_decay=0.1)
    torch.testing.assert_close(model.weight.double(), expected, rtol=1e-5, atol=1e-7)
    expected = adamw(start["bias"], gradients["bias"], weight_decay=0.0)
    torch.testing.assert_close(model.bias.double(), expected, rtol=1e-5, atol=1e-7)


def test_every_trainable_parameter_is_named_once_and_matrices_alone_decay() -> None:
    model = tiny_model("gpt2")  # biases, layer norms, and an output head tied to the embedding
    frozen = "transformer.wpe.weight"
    model.get_parameter(frozen).requires_grad_(False)
    optimizer = make_optimizer(model, **SETTINGS)
    named = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    parameters = dict(model.named_parameters())
    assert named == {
        name: 0.1 if p.ndim >= 2 else 0.0 for name, p in parameters.items() if name != frozen
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters) - 1
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_model_of_matrices_only_has_one_group() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2, bias=False), **SETTINGS)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_a_wholly_frozen_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no trainable parameter: .*with lora: true"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), **SETTINGS)


def parameters_with(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for gradient in gradients:
        like = torch.zeros(1) if gradient is None else torch.zeros_like(gradient)
        parameters.append(nn.Parameter(like))
        parameters[-1].grad = gradient
    return parameters


def test_clip_scales_a_3_4_gradient_to_the_norm_asked_for() -> None:
    parameters = parameters_with(torch.tensor([[3.0]]), None, torch.tensor([4.0]))
    assert clip(parameters, 1.0).item() == 5.0
    assert parameters[0].grad is not None and parameters[2].grad is not None
    assert parameters[0].grad.item() == pytest.approx(0.6, rel=1e-6)
    assert parameters[2].grad.item() == pytest.approx(0.8, rel=1e-6)


@pytest.mark.parametrize("max_norm", [None, 5.1])
def test_clip_leaves_a_shorter_gradient_bit_for_bit(max_norm: float | None) -> None:
    parameters = parameters_with(torch.tensor([[3.0, 4.0]]))
    assert clip(iter(parameters), max_norm).item() == 5.0
    assert parameters[0].grad is not None
    assert torch.equal(parameters[0].grad, torch.tensor([[3.0, 4.0]]))


def test_the_norm_of_no_gradient_is_zero() -> None:
    assert clip(parameters_with(None), 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_small_numbers_is_exact_to_fp32(dtype: torch.dtype) -> None:
    # One fp32 sum over this many squares is 4e-4 off; bf16 has three digits.
    torch.manual_seed(0)
    gradient = torch.rand(8192, 576).to(dtype)
    scalar = torch.tensor(2.0, dtype=dtype)
    norm = clip(parameters_with(gradient, scalar), None)
    assert norm.dtype == torch.float32
    expected = math.sqrt(gradient.double().square().sum().item() + 4)
    assert norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned(bad: float) -> None:
    assert not clip(parameters_with(torch.tensor([1.0, bad])), 1.0).isfinite()


def test_8_bit_moments_without_their_package_name_the_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(
        ModelError, match=r"moments=8bit needs .* pip install 'upweight\[eightbit\]'"
    ):
        require_moments("8bit")
    require_moments("float32")


def eight_bit_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_8_bit_moments_move_weights_as_adamw_does_and_resume_bit_identically(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 3))
    cut, exact = deepcopy(whole), deepcopy(whole)
    start = whole[0].weight.detach().clone()
    optimizers = [
        make_optimizer(m, **SETTINGS, moments=kind)
        for m, kind in ((whole, "8bit"), (cut, "8bit"), (exact, "float32"))
    ]
    eight_bit_steps(whole, optimizers[0], range(20))
    eight_bit_steps(exact, optimizers[2], range(20))
    off, moved = (whole[0].weight - exact[0].weight).norm(), (exact[0].weight - start).norm()
    # Small ones stay in fp32; 8 bits round a mean by 2 % or so, another way at every step.
    assert 0 < off < 0.05 * moved
    torch.testing.assert_close(whole[1].weight, exact[1].weight, rtol=1e-4, atol=1e-6)
    assert sum(p.nbytes for p in room_for_moments(optimizers[0])) * 4 == sum(
        p.nbytes for p in room_for_moments(optimizers[2])
    )
    eight_bit_steps(cut, optimizers[1], range(10))
    position = Position(10, 1.0, 0, 0, "", "")
    saved = save(tmp_path, capture(cut, optimizers[1], position))
    again = deepcopy(exact)
    resumed = make_optimizer(again, **SETTINGS, moments="8bit")
    restore(again, resumed, load(saved))
    eight_bit_steps(again, resumed, range(10, 20))
    for p, q in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
