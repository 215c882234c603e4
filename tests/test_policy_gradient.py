"""The objective of PPO, GRPO and RLOO: its value and its slopes in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from oracles import loaded, random_trees
from upweight.data.pack import collate
from upweight.training.objectives import Surrogate, policy_gradient
from upweight.types import Experience

FOREST = collate(random_trees([(3, 4, 1, 2), (2, 5, 5, 1), (4, 2, 3, 6)], seed=2))
NUM = len(FOREST.scored)
LM = loaded()  # which the stub of values does not read
LOW, HIGH, VALUE_CLIP = 0.1, 0.3, 0.4


def noise(seed: int, size: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return size * torch.randn(NUM, dtype=torch.float64, generator=draw)


LOGPS = -3 + noise(0)
KNOWN = Experience(
    logps=LOGPS + noise(1, 0.3),
    reference_logps=LOGPS + noise(2, 0.5),
    advantages=noise(3),
    values=noise(4),
    returns=noise(5),
)
VALUES = KNOWN.values + noise(6, 0.5)
PLAIN = Surrogate(clip_low=LOW, clip_high=HIGH, aggregation="token", max_tokens=8)


def slopes(surrogate: Surrogate, beta=lambda: 0.0, values: bool = False):
    """(step, d loss / d logp, d loss / d value), the loss a mean over tokens."""
    logps, worth = LOGPS.clone().requires_grad_(), VALUES.clone().requires_grad_()
    objective = policy_gradient(
        lambda forest: KNOWN, surrogate, lambda lm, forest: (logps, worth if values else None), beta
    )
    step = objective.step(LM, FOREST)
    found = torch.autograd.grad(
        step.loss_sum / step.count, (logps, worth), allow_unused=True, materialize_grads=True
    )
    return replace(step, loss_sum=step.loss_sum.detach()), *(x.tolist() for x in found)


def by_token(*known: torch.Tensor):
    return zip(*(x.tolist() for x in known), strict=True)


def surrogate_slopes() -> list[tuple[float, float]]:
    """(value, slope by the log-prob) of -min(r A, clip(r, 0.9, 1.3) A): -r A where the ratio is
    inside, and where it is outside on the side that A pulls back from."""
    found: list[tuple[float, float]] = []
    for logp, old, a in by_token(LOGPS, KNOWN.logps, KNOWN.advantages):
        ratio = math.exp(logp - old)
        near = min(max(ratio, 1 - LOW), 1 + HIGH)
        clipped = near * a < ratio * a
        found.append((-min(ratio * a, near * a), 0.0 if clipped else -ratio * a))
    return found


def means(step) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in step.metrics.items()}


def test_the_clips_are_each_on_its_own_side():
    step, found, _ = slopes(PLAIN)
    wanted = surrogate_slopes()
    assert float(step.loss_sum) == pytest.approx(sum(value for value, _ in wanted))
    assert found == pytest.approx([slope / NUM for _, slope in wanted], abs=1e-12)
    # Tokens between the bounds of one clip and of the other tell them apart.
    ratios = (LOGPS - KNOWN.logps).exp()
    up, down = KNOWN.advantages > 0, KNOWN.advantages < 0
    assert bool((up & (ratios > 1 + LOW) & (ratios < 1 + HIGH)).any())
    assert bool((down & (ratios < 1 - LOW) & (ratios > 1 - HIGH)).any())
    shown = means(step)
    clipped = [slope == 0 for _, slope in wanted]
    assert shown["clip_fraction"] == pytest.approx(sum(clipped) / NUM) and any(clipped)
    assert shown["ratio"] == pytest.approx(ratios.mean().item())
    gap = KNOWN.logps - LOGPS
    wanted_kl = (torch.exp(-gap) - 1 + gap).mean().item()
    assert shown["approx_kl"] == pytest.approx(wanted_kl)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_kl_in_the_loss_pulls_to_the_reference_with_the_beta_of_the_moment(kl: str):
    """k2 = x^2/2 with slope x, k3 = e^-x - 1 + x with slope 1 - e^-x, x = logp - reference logp:
    a token that has become likelier than under the reference has a positive slope."""
    now = [0.3]
    surrogate = replace(PLAIN, kl=kl)
    for beta in (0.3, 1.1):
        now[0] = beta
        step, found, _ = slopes(surrogate, lambda: now[0])
        value, wanted = 0.0, []
        for (loss, slope), (logp, reference) in zip(
            surrogate_slopes(), by_token(LOGPS, KNOWN.reference_logps), strict=True
        ):
            x = logp - reference
            value += loss + beta * (x * x / 2 if kl == "k2" else math.exp(-x) - 1 + x)
            wanted.append((slope + beta * (x if kl == "k2" else 1 - math.exp(-x))) / NUM)
        assert float(step.loss_sum) == pytest.approx(value)
        assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("clip", [None, VALUE_CLIP])
@pytest.mark.parametrize("coefficient", [1.0, 0.1])
def test_the_value_loss_stands_beside_the_policys_with_its_coefficient(
    coefficient: float, clip: float | None
):
    surrogate = replace(PLAIN, value_coefficient=coefficient, value_clip=clip)
    step, by_logp, by_value = slopes(surrogate, values=True)
    policy = surrogate_slopes()
    assert by_logp == pytest.approx([slope / NUM for _, slope in policy], abs=1e-12)
    error, wanted = 0.0, []
    for v, old, r in by_token(VALUES, KNOWN.values, KNOWN.returns):
        near = v if clip is None else old + min(max(v - old, -clip), clip)
        error += max((v - r) ** 2, (near - r) ** 2) / 2
        held = (near - r) ** 2 > (v - r) ** 2
        wanted.append(0.0 if held and near != v else coefficient * (v - r) / NUM)
    assert by_value == pytest.approx(wanted, abs=1e-12)
    total = sum(value for value, _ in policy)
    assert float(step.loss_sum) == pytest.approx(total + coefficient * error)
    shown = means(step)
    assert shown["policy_loss"] == pytest.approx(total / NUM)
    assert shown["value_loss"] == pytest.approx(error / NUM)


@pytest.mark.parametrize("aggregation", ["response", "constant"])
def test_policy_and_value_loss_add_up_to_the_loss_whatever_it_is_a_mean_of(aggregation: str):
    surrogate = replace(PLAIN, aggregation=aggregation, value_coefficient=0.3)
    step, _, _ = slopes(surrogate, values=True)
    shown = means(step)
    loss = float(step.loss_sum / step.count)
    assert loss == pytest.approx(shown["policy_loss"] + 0.3 * shown["value_loss"])
    assert loss != pytest.approx(float(step.loss_sum) / NUM)


def test_without_values_there_is_no_value_loss():
    step, _, by_value = slopes(PLAIN)
    assert not any(by_value)
    assert not {"value_loss", "policy_loss"} & step.metrics.keys()
