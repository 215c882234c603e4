"""The losses on sampled responses, against slow definitions and exact expectations, in float64."""

import inspect
import math
import re
from itertools import product

import pytest
import torch

from upweight.losses import AGGREGATIONS, GROUP_ADVANTAGES, KL_ESTIMATORS, bradley_terry
from upweight.losses.advantages import (
    dr_grpo,
    generalized_advantages,
    grpo,
    next_kl_coefficient,
    penalized_rewards,
    rloo,
    stop_penalized,
    whiten,
)
from upweight.losses.policy import clipped_surrogate, clipped_tokens, clipped_value_loss

SIZES = (3, 1, 7, 2, 1)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def noise(num, seed=0):
    return torch.randn(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def responses(sizes=SIZES):
    """(response_of, tokens_per_response)"""
    tokens = torch.tensor(sizes, dtype=torch.long)
    return torch.arange(len(sizes)).repeat_interleave(tokens), tokens


# The clipped surrogate


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_surrogate_is_the_lesser_of_the_ratio_and_the_clipped_ratio(dual):
    ratios, advantages = zip(
        *product((0.01, 0.7, 0.85, 1.0, 1.25, 1.35, 2.9, 40.0), (-2.0, -0.1, 0.0, 0.1, 2.0)),
        strict=True,
    )
    old = noise(len(ratios))
    got = clipped_surrogate(
        old + f64(*ratios).log(), old, f64(*advantages), clip_low=0.2, clip_high=0.3, dual_clip=dual
    )
    for value, r, a in zip(got.tolist(), ratios, advantages, strict=True):
        wanted = min(r * a, min(max(r, 0.8), 1.3) * a)
        if dual is not None and a < 0:
            wanted = max(wanted, dual * a)
        assert value == pytest.approx(-wanted, abs=1e-12)


def test_at_ratio_1_the_gradient_of_the_surrogate_is_minus_the_advantage():
    logps, advantages = noise(9).requires_grad_(), noise(9, 1)
    loss = clipped_surrogate(logps, logps.detach(), advantages)
    torch.testing.assert_close(loss, -advantages, rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(slope, -advantages, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"clip_high": 0.28}, {"clip_low": 1.0, "dual_clip": 2.0}])
def test_the_clipped_tokens_are_those_without_a_gradient(options):
    logps, advantages = noise(400).requires_grad_(), noise(400, 1)
    old = torch.zeros_like(logps)
    (slope,) = torch.autograd.grad(
        clipped_surrogate(logps, old, advantages, **options).sum(), logps
    )
    clipped = clipped_tokens(logps, old, advantages, **options)
    assert torch.equal(clipped, slope == 0)
    assert 0.05 < clipped.double().mean() < 0.95


def test_a_ratio_beyond_every_float_is_clipped_without_nan():
    logps = f64(800.0, 800.0, -800.0, 800.0).requires_grad_()
    advantages = f64(1.0, -1.0, -1.0, 0.0)
    loss = clipped_surrogate(logps, torch.zeros_like(logps), advantages, dual_clip=3.0)
    torch.testing.assert_close(loss, f64(-1.2, 3.0, 0.8, 0.0))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert slope.tolist() == [0, 0, 0, 0]


def test_a_token_without_an_advantage_has_no_loss_whatever_its_ratio():
    logps = f64(800.0, -800.0).requires_grad_()
    loss = clipped_surrogate(logps, torch.zeros_like(logps), torch.zeros_like(logps))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.tolist() == slope.tolist() == [0, 0]


# The value loss


def test_the_value_loss_is_the_worse_of_the_value_and_the_value_held_near():
    values, old, returns = noise(200), noise(200, 1), noise(200, 2)
    got = clipped_value_loss(values, old, returns, clip=0.3)
    for value, v, o, r in zip(*(x.tolist() for x in (got, values, old, returns)), strict=True):
        near = min(max(v, o - 0.3), o + 0.3)
        assert value == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2, abs=1e-12)
    plain = clipped_value_loss(values, old, returns, clip=math.inf)
    torch.testing.assert_close(plain, (values - returns).square() / 2)


def test_a_value_that_left_its_clip_towards_its_return_has_no_gradient():
    values = f64(0.5, -0.5, 0.1).requires_grad_()
    loss = clipped_value_loss(values, torch.zeros(3).double(), f64(1.0, 1.0, 1.0), clip=0.2)
    (slope,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(slope, f64(0.0, -1.5, -0.9))


# KL estimators: exact sums over a small vocabulary


def distributions(distance=2.0):
    logits, reference = noise(6, 3).requires_grad_(), noise(6, 4).log_softmax(0)
    return logits, (reference.detach() + distance * logits).log_softmax(0), reference


def kl(p, q):
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name):
    _, policy, reference = distributions()
    expected = (policy.exp() * KL_ESTIMATORS[name](policy, reference)).sum()
    assert expected.item() == pytest.approx(kl(policy, reference).item(), abs=1e-12)


def test_the_bias_of_k2_is_of_third_order():
    def bias(distance):
        _, policy, reference = distributions(distance)
        expected = (policy.exp() * KL_ESTIMATORS["k2"](policy, reference)).sum()
        return (expected - kl(policy, reference)).item()

    # Half the distance, an eighth of the bias, up to the next order, which is d smaller.
    assert abs(bias(2.0)) > 0.01
    assert bias(2e-3) / bias(1e-3) == pytest.approx(8, rel=0.01)


def test_k2_and_k3_are_never_negative_and_0_where_the_policy_is_the_reference():
    _, policy, reference = distributions()
    for name in ("k2", "k3"):
        assert (KL_ESTIMATORS[name](policy, reference) > 0).all()
    for estimate in KL_ESTIMATORS.values():
        assert estimate(policy, policy).tolist() == [0] * 6


def test_differentiated_k1_does_nothing_k2_is_the_reverse_kl_and_k3_the_forward_kl():
    logits, policy, reference = distributions()

    def slope(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    wanted = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": slope(kl(policy, reference)),
        "k3": slope(kl(reference, policy)),
    }
    assert (wanted["k2"] - wanted["k3"]).abs().max() > 0.05
    for name, estimate in KL_ESTIMATORS.items():
        # Samples are drawn from the policy, and drawing has no gradient.
        got = slope((policy.exp().detach() * estimate(policy, reference)).sum())
        torch.testing.assert_close(got, wanted[name], rtol=0, atol=1e-12)


# Generalized advantages


def slow_advantages(rewards, values, sizes, gamma, lam):
    """The definition: discounted sums of the one-step errors, a token at a time."""
    found, start = [], 0
    for size in sizes:
        r, v = rewards[start : start + size].tolist(), values[start : start + size].tolist()
        start += size
        errors = [r[t] + gamma * (v[t + 1] if t + 1 < size else 0) - v[t] for t in range(size)]
        found += [
            sum((gamma * lam) ** (j - t) * errors[j] for j in range(t, size)) for t in range(size)
        ]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [SIZES, (1,), (5, 5), ()])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0)])
def test_the_advantages_are_the_sums_of_their_definition(sizes, gamma, lam):
    rewards, values = noise(sum(sizes)), noise(sum(sizes), 1)
    tokens = torch.tensor(sizes, dtype=torch.long)
    got, returns = generalized_advantages(rewards, values, tokens, gamma=gamma, lam=lam)
    wanted = slow_advantages(rewards, values, sizes, gamma, lam)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, wanted + values, rtol=0, atol=1e-12)


def test_with_lambda_1_the_advantage_is_the_return_minus_the_value():
    rewards, values, (_, tokens) = noise(14), noise(14, 1), responses()
    got, returns = generalized_advantages(rewards, values, tokens, gamma=0.9, lam=1.0)
    wanted = torch.cat(
        [
            f64(*(sum(0.9**j * x for j, x in enumerate(r.tolist()[t:])) for t in range(len(r))))
            for r in rewards.split(list(SIZES))
        ]
    )
    torch.testing.assert_close(returns, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, wanted - values, rtol=0, atol=1e-12)


def test_with_lambda_0_the_advantage_is_the_one_step_error():
    values = f64(1.0, 2.0, 4.0, 8.0)
    got, _ = generalized_advantages(
        f64(10.0, 20.0, 40.0, 80.0), values, torch.tensor([3, 1]), gamma=0.5, lam=0.0
    )
    assert got.tolist() == [10 + 1 - 1, 20 + 2 - 2, 40 - 4, 80 - 8]


def test_advantages_and_returns_are_targets_without_a_gradient():
    rewards, values = noise(14).requires_grad_(), noise(14, 1).requires_grad_()
    for target in (*generalized_advantages(rewards, values, responses()[1]), whiten(values)):
        assert not target.requires_grad


# The policy gradient, exactly: a bandit of five arms


ARMS = noise(5, 7)


def bandit():
    """(logits, log-probs, the exact gradient of the mean score)"""
    logits = noise(5, 6).requires_grad_()
    logps = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logps.exp() * ARMS).sum(), logits, retain_graph=True)
    return logits, logps, exact


@pytest.mark.parametrize("baseline", [0.0, 3.7])
def test_the_expected_gradient_of_the_surrogate_is_the_policy_gradient(baseline):
    logits, logps, exact = bandit()
    loss = clipped_surrogate(logps, logps.detach(), ARMS - baseline)
    (slope,) = torch.autograd.grad((logps.exp().detach() * loss).sum(), logits)
    torch.testing.assert_close(-slope, exact, rtol=0, atol=1e-12)


def group_gradient(name, size):
    """E over all groups of `size` draws of the mean gradient of the surrogate."""
    logits, logps, exact = bandit()
    groups = torch.tensor(list(product(range(5), repeat=size)))
    chance = logps.detach()[groups].sum(1).exp()
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    group_of = torch.arange(len(groups)).repeat_interleave(size)
    advantages = GROUP_ADVANTAGES[name](ARMS[groups.flatten()], group_of)
    drawn = logps[groups.flatten()]
    loss = clipped_surrogate(drawn, drawn.detach(), advantages).view(-1, size).mean(1)
    (slope,) = torch.autograd.grad((chance * loss).sum(), logits)
    return -slope, exact


@pytest.mark.parametrize("size", [2, 3, 4])
def test_over_all_groups_rloo_is_the_policy_gradient_and_dr_grpo_short_of_it(size):
    slope, exact = group_gradient("rloo", size)
    torch.testing.assert_close(slope, exact, rtol=0, atol=1e-12)
    slope, exact = group_gradient("dr_grpo", size)
    torch.testing.assert_close(slope, exact * (size - 1) / size, rtol=0, atol=1e-12)


def test_over_all_groups_grpo_is_not_along_the_policy_gradient():
    slope, exact = group_gradient("grpo", 4)
    assert 0.8 < torch.cosine_similarity(slope, exact, dim=0) < 0.995


def test_the_sampled_gradient_is_the_policy_gradient_within_its_interval():
    """20,000 draws: within 4.5 standard errors, which 1 of 30,000 seeds would miss by chance
    (five components, two-sided normal tail 6.8e-6 each)."""
    logits, logps, exact = bandit()
    draws = torch.multinomial(
        logps.detach().exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    # One draw's gradient by the logits is -A (onehot - pi), the chain rule by hand, so that the
    # spread over draws is known; the loss's own slope is in it.
    drawn = logps.detach()[draws].requires_grad_()
    loss = clipped_surrogate(drawn, drawn.detach(), ARMS[draws])
    (by_logp,) = torch.autograd.grad(loss.sum(), drawn)
    onehot = torch.nn.functional.one_hot(draws, 5).double()
    each = -by_logp[:, None] * (onehot - logps.detach().exp())
    error = each.std(0) / math.sqrt(len(draws))
    assert ((each.mean(0) - exact).abs() < 4.5 * error).all()
    assert (error < 0.02).all()


# Whitening


def test_whitened_values_have_mean_0_and_variance_1():
    x = 5 + 3 * noise(50)
    got = whiten(x)
    assert got.mean().item() == pytest.approx(0, abs=1e-12)
    assert got.square().mean().item() == pytest.approx(1, abs=1e-8)
    torch.testing.assert_close(whiten(x, shift_mean=False), got + x.mean())
    torch.testing.assert_close(whiten(f64(1.0, 3.0)), f64(-1.0, 1.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("value", [1000.1, -3.3, 0.0])
def test_equal_values_are_whitened_to_0(value):
    x = torch.full((7,), value)
    assert whiten(x).tolist() == [0] * 7
    torch.testing.assert_close(whiten(x, shift_mean=False), x)
    assert whiten(x[:0]).tolist() == []


# Group advantages


def test_the_group_advantages_of_1_2_3_are_their_closed_forms():
    scores, group_of = f64(1.0, 2.0, 3.0), torch.tensor([4, 4, 4])
    assert dr_grpo(scores, group_of).tolist() == [-1, 0, 1]
    assert rloo(scores, group_of).tolist() == [1 - 2.5, 2 - 2, 3 - 1.5]
    torch.testing.assert_close(grpo(scores, group_of, eps=0.5), f64(-1.0, 0.0, 1.0) / 1.5)


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_groups_do_not_see_each_other_however_they_lie(name):
    advantages = GROUP_ADVANTAGES[name]
    group_of = torch.tensor([9, 2, 9, 9, 2, 30, 9, 30])
    scores = noise(8)
    got = advantages(scores, group_of)
    for group in (2, 9, 30):
        mine = group_of == group
        torch.testing.assert_close(got[mine], advantages(scores[mine], group_of[mine]))
        assert got[mine].sum().item() == pytest.approx(0, abs=1e-12)
    shifted = advantages(scores + 5.0 * group_of, group_of)
    torch.testing.assert_close(shifted, got, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_equal_scores_and_lone_responses_have_no_advantage(name):
    # fp32, where the mean of equal numbers is not always that number.
    scores = torch.tensor([0.1] * 7 + [1e4 / 3] * 3 + [-2.7])
    group_of = torch.tensor([0] * 7 + [1] * 3 + [2])
    assert GROUP_ADVANTAGES[name](scores, group_of).tolist() == [0] * 11


NUDGES = f64(0.02, 0.04, 0.05, 0.01)


def test_what_the_kl_takes_is_not_blown_up_where_no_reward_tells_answers_apart():
    scores, group_of = f64(1.0, 1.0, 0.0, 2.0), torch.tensor([0, 0, 1, 1])
    penalty = f64(0.02, 0.04, 0.1, 0.3)
    deviation = f64(0.01, -0.01, -0.9, 0.9)
    torch.testing.assert_close(dr_grpo(scores, group_of, penalty), deviation)
    torch.testing.assert_close(rloo(scores, group_of, penalty), 2 * deviation)
    # Two values d apart have the variance d^2/2: 2 for the scores, 0.02 for what the KL takes.
    weight = 2 / 2.02
    factor = weight / (math.sqrt(2) + 1e-4) + 1 - weight
    got = grpo(scores, group_of, penalty)
    torch.testing.assert_close(got, deviation * f64(1.0, 1.0, factor, factor))


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
def test_near_ties_of_grpo_are_not_blown_up_by_what_the_kl_takes(gap: float):
    """Divided by the spread of the scores, the second pair's penalty would be 0.04 / 1e-4 at a gap
    of 1e-6. A score's own part is below one deviation, sqrt(3) at most in a group of four."""
    scores, group_of = f64(1.0 + gap, 1.0, 1.0, 1.0), torch.zeros(4, dtype=torch.long)
    got = grpo(scores, group_of, NUDGES)
    undivided = dr_grpo(torch.zeros_like(scores), group_of, NUDGES)
    part = got - grpo(scores, group_of) * weight_of_scores(scores, NUDGES)
    assert (part - undivided).abs().max() <= math.sqrt(3) / 2 + gap
    assert got.abs().max() <= 1.5 * math.sqrt(3) + 0.05
    if gap <= 1e-6:
        torch.testing.assert_close(got, undivided, rtol=0, atol=1e-5)


def weight_of_scores(scores, penalty):
    return scores.var() / (scores.var() + penalty.var())


def test_grpo_has_no_step_where_scores_begin_to_differ():
    group_of = torch.zeros(4, dtype=torch.long)
    gaps = [0.0, *(10 ** (-8 + n / 100) for n in range(801))]
    found = [grpo(f64(1.0 + gap, 1.0, 1.0, 1.0), group_of, NUDGES) for gap in gaps]
    steps = [(b - a).abs().max().item() for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) < 0.02


def test_grpo_is_the_papers_formula_without_a_penalty_or_where_all_pay_the_same():
    scores, group_of = noise(9), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    wanted = torch.cat([(x - x.mean()) / (x.std() + 1e-4) for x in scores.split([3, 4, 2])])
    for penalty in (None, torch.zeros(9), torch.full((9,), 0.25)):
        got = grpo(scores, group_of, penalty)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


# Aggregations


def plain_mean(name, losses, sizes, longest):
    pieces = [piece.tolist() for piece in losses.split(list(sizes))]
    if name == "token":
        return sum(map(sum, pieces)) / sum(sizes)
    if name == "response":
        return sum(sum(piece) / len(piece) for piece in pieces) / len(pieces)
    return sum(map(sum, pieces)) / (len(pieces) * longest)


@pytest.mark.parametrize("cuts", [(), (2,), (1, 2, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_mean_is_the_stated_one_however_a_step_is_cut(name, cuts):
    losses, total, count = noise(sum(SIZES)), 0.0, 0.0
    for first, last in zip((0, *cuts), (*cuts, len(SIZES)), strict=True):
        response_of, tokens = responses(SIZES[first:last])
        weight, some = AGGREGATIONS[name](response_of, tokens, max_new_tokens=11)
        start = sum(SIZES[:first])
        total += (weight.double() * losses[start : start + len(weight)]).sum().item()
        count += some.item()
    # Weights are fp32: relative 6e-8 each.
    assert total / count == pytest.approx(plain_mean(name, losses, SIZES, 11), abs=1e-6)


# Rewards per token


def test_the_penalty_is_paid_at_every_token_and_the_score_at_the_last():
    got = penalized_rewards(
        f64(10.0, -20.0), f64(1.0, 2.0, 3.0, 4.0), torch.tensor([3, 1]), beta=0.5
    )
    assert got.tolist() == [-0.5, -1.0, -1.5 + 10, -2.0 - 20]


def test_a_response_that_did_not_stop_pays_the_stop_penalty():
    got = stop_penalized(f64(1.0, 2.0), torch.tensor([True, False]), penalty=3.0)
    assert got.tolist() == [1, -1]


def test_the_kl_coefficient_follows_the_error_and_no_more_than_a_fifth_of_it():
    assert next_kl_coefficient(0.2, 6.0, target=6.0) == 0.2
    assert next_kl_coefficient(0.2, 6.6, target=6.0) == pytest.approx(0.2 * 1.01)
    assert next_kl_coefficient(0.2, 600.0, target=6.0) == pytest.approx(0.2 * 1.02)
    assert next_kl_coefficient(0.2, -9.0, target=6.0, gain=0.5) == pytest.approx(0.2 * 0.9)
    assert math.isnan(next_kl_coefficient(0.2, math.nan, target=6.0))


# The reward model's loss


def test_equal_scores_cost_ln_2_and_the_slope_is_sigmoid_of_minus_the_distance():
    chosen, rejected = f64(1.0, 4.0, 900.0).requires_grad_(), f64(1.0, 6.0, -900.0)
    loss = bradley_terry(chosen, rejected)
    assert loss[0].item() == pytest.approx(math.log(2), abs=1e-12)
    assert loss[2].item() == 0
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    torch.testing.assert_close(slope, -torch.sigmoid(rejected - chosen.detach()))


def test_only_distances_count_unless_scores_are_centred():
    chosen, rejected = noise(5), noise(5, 1)
    plain = bradley_terry(chosen, rejected)
    torch.testing.assert_close(bradley_terry(chosen + 7, rejected + 7), plain)
    centred = bradley_terry(chosen, rejected, centering=0.01)
    torch.testing.assert_close(centred - plain, 0.01 * (chosen + rejected) ** 2)


def test_a_margin_asks_for_that_much_distance():
    scores, margin = noise(5), f64(0.0, 0.5, 1.0, 2.0, -1.0)
    at_margin = bradley_terry(scores + margin, scores, margin=margin)
    torch.testing.assert_close(at_margin, torch.full_like(scores, math.log(2)))


def test_a_soft_label_is_met_where_its_log_odds_are_the_distance():
    flipped = f64(0.1, 0.3, 0.5, 0.8)
    distance = (1 / flipped - 1).log().requires_grad_()
    loss = bradley_terry(distance, torch.zeros(4).double(), flipped=flipped)
    (slope,) = torch.autograd.grad(loss.sum(), distance)
    assert slope.abs().max() < 1e-12
    chosen, rejected = noise(4), noise(4, 1)
    torch.testing.assert_close(
        bradley_terry(chosen, rejected, margin=0.4, flipped=flipped),
        bradley_terry(rejected, chosen, margin=-0.4, flipped=1 - flipped),
    )


@pytest.mark.parametrize(
    "function",
    [
        *(*GROUP_ADVANTAGES.values(), *AGGREGATIONS.values(), *KL_ESTIMATORS.values()),
        *(clipped_surrogate, clipped_value_loss, generalized_advantages, whiten),
        *(penalized_rewards, stop_penalized, next_kl_coefficient, bradley_terry),
    ],
)
def test_each_function_names_its_source(function):
    assert re.search(r"arXiv:\d{4}\.\d{5}|Schulman 2020", inspect.getdoc(function) or "")
