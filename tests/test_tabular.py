"""A language of 40 strings, on which every method's optimum is known: does each one reach it?

Letters 0, 1, 2 and the stop token 3; a string ends in its stop token or is cut at three tokens.
A policy is one row of logits per prefix, so that it can be any distribution over the strings, and
every expectation is a sum over all of them: no sampling, no chance.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from upweight.losses import AGGREGATIONS, GROUP_ADVANTAGES, KL_ESTIMATORS, PAIR_LOSSES, PairLogps
from upweight.losses.advantages import generalized_advantages, penalized_rewards
from upweight.losses.policy import clipped_surrogate, clipped_value_loss
from upweight.losses.reward import bradley_terry

STOP, LONGEST, BETA = 3, 3, 0.5
PREFIXES = [p for n in range(LONGEST) for p in product(range(STOP), repeat=n)]
STRINGS = [(*p, STOP) for p in PREFIXES] + list(product(range(STOP), repeat=LONGEST))
TOKENS = torch.tensor([len(s) for s in STRINGS])
STRING_OF = torch.arange(len(STRINGS)).repeat_interleave(TOKENS)
STATE = torch.tensor([PREFIXES.index(s[:t]) for s in STRINGS for t in range(len(s))])
ACTION = torch.tensor([a for s in STRINGS for a in s])


def noise(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def token_logps(logits):
    return logits.log_softmax(-1)[STATE, ACTION]


def per_string(values):
    return values.new_zeros(len(STRINGS)).index_add(0, STRING_OF, values)


REFERENCE = token_logps(noise(len(PREFIXES), STOP + 1, seed=1))
REWARD = noise(len(STRINGS), seed=2)
OPTIMUM = (per_string(REFERENCE) + REWARD / BETA).softmax(0)


def policy_of(logits):
    return per_string(token_logps(logits)).detach().exp()


def distance(policy, optimum=OPTIMUM):
    """Total variation."""
    return 0.5 * (policy - optimum).abs().sum().item()


def logits_of(strings):
    """The policy that gives these probabilities to the strings."""
    logits = torch.empty(len(PREFIXES), STOP + 1, dtype=torch.float64)
    for state, prefix in enumerate(PREFIXES):
        for action in range(STOP + 1):
            begins = torch.tensor([s[: len(prefix) + 1] == (*prefix, action) for s in STRINGS])
            logits[state, action] = strings[begins].sum().log()
    return logits


def start():
    return noise(len(PREFIXES), STOP + 1, seed=1).requires_grad_()


def test_the_language_is_a_language_and_its_optimum_is_far_from_the_reference():
    assert len(STRINGS) == 40
    reference = per_string(REFERENCE).exp()
    assert reference.sum().item() == pytest.approx(1, abs=1e-12)
    assert distance(reference) > 0.3
    torch.testing.assert_close(policy_of(logits_of(OPTIMUM)), OPTIMUM)


def minimise(loss, *free):
    solver = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(closure)


FIRST, SECOND = torch.combinations(torch.arange(len(STRINGS))).T
BETTER = torch.sigmoid(REWARD[FIRST] - REWARD[SECOND])


def test_a_reward_model_recovers_the_reward_up_to_a_constant_of_the_prompt():
    scores = [noise(len(STRINGS), seed=s).requires_grad_() for s in (3, 4)]
    rewards = [REWARD, REWARD.flip(0)]
    flipped = [1 - torch.sigmoid(r[FIRST] - r[SECOND]) for r in rewards]

    def loss():
        return sum(
            bradley_terry(s[FIRST], s[SECOND], flipped=e).sum()
            for s, e in zip(scores, flipped, strict=True)
        )

    minimise(loss, *scores)
    offsets = [(s - r).detach() for s, r in zip(scores, rewards, strict=True)]
    for offset in offsets:
        assert (offset - offset.mean()).abs().max() < 1e-5
    assert abs(offsets[0].mean() - offsets[1].mean()) > 0.05


def test_dpo_on_exact_preferences_reaches_the_optimum():
    logits = start()
    reference = per_string(REFERENCE)

    def loss():
        policy = per_string(token_logps(logits))
        better = PairLogps(
            policy[FIRST], policy[SECOND], reference[FIRST], reference[SECOND],
            TOKENS[FIRST], TOKENS[SECOND],
        )  # fmt: skip
        worse = replace(
            better,
            policy_chosen=policy[SECOND],
            policy_rejected=policy[FIRST],
            reference_chosen=reference[SECOND],
            reference_rejected=reference[FIRST],
        )
        dpo = partial(PAIR_LOSSES["dpo"], beta=BETA)
        return (BETTER * dpo(better) + (1 - BETTER) * dpo(worse)).sum()

    minimise(loss, logits)
    assert distance(policy_of(logits)) < 1e-4


def test_ppo_with_a_kl_penalty_reaches_the_optimum():
    logits, values = start(), torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.05)
    for _ in range(300):
        old_logps, old_values = token_logps(logits).detach(), values[STATE].detach()
        chance = per_string(old_logps).exp()[STRING_OF]
        rewards = penalized_rewards(
            REWARD, KL_ESTIMATORS["k1"](old_logps, REFERENCE), TOKENS, beta=BETA
        )
        advantages, returns = generalized_advantages(rewards, old_values, TOKENS)
        for _ in range(2):
            optimizer.zero_grad()
            policy = clipped_surrogate(token_logps(logits), old_logps, advantages)
            value = clipped_value_loss(values[STATE], old_values, returns, clip=0.5)
            (chance * (policy + value)).sum().backward()
            optimizer.step()
    assert distance(policy_of(logits)) < 0.02
    # The value of the empty prefix is that of the objective: beta log Z.
    log_z = (per_string(REFERENCE) + REWARD / BETA).logsumexp(0)
    assert values[0].item() == pytest.approx((BETA * log_z).item(), abs=0.02)


# Every ordered group of two strings, as one batch of 3,200 responses with its probabilities.
GROUPS = torch.cartesian_prod(torch.arange(len(STRINGS)), torch.arange(len(STRINGS)))
MEMBERS = GROUPS.flatten()
GROUP_OF = torch.arange(len(GROUPS)).repeat_interleave(2)
STARTS = TOKENS.cumsum(0) - TOKENS
MEMBER_OF = torch.arange(len(MEMBERS)).repeat_interleave(TOKENS[MEMBERS])
WITHIN = torch.cat([torch.arange(n) for n in TOKENS[MEMBERS].tolist()])
PLACE = STARTS[MEMBERS][MEMBER_OF] + WITHIN


def group_loss(logits, old_logps, name, aggregation="constant", kl_in_loss=None):
    """The expected loss over all groups of two, the KL in the reward or, by name, in the loss."""
    old_strings = per_string(old_logps)
    penalty = None
    if kl_in_loss is None:
        penalty = BETA * per_string(KL_ESTIMATORS["k1"](old_logps, REFERENCE))[MEMBERS]
    advantages = GROUP_ADVANTAGES[name](REWARD[MEMBERS], GROUP_OF, penalty)
    logps = token_logps(logits)
    loss = clipped_surrogate(logps[PLACE], old_logps[PLACE], advantages[MEMBER_OF])
    if kl_in_loss is not None:
        loss = loss + BETA * KL_ESTIMATORS[kl_in_loss](logps, REFERENCE)[PLACE]
    weight, _ = AGGREGATIONS[aggregation](MEMBER_OF, TOKENS[MEMBERS], max_new_tokens=LONGEST)
    chance = old_strings[GROUPS].sum(1).exp()[GROUP_OF][MEMBER_OF]
    return (chance * weight * loss).sum()


def descend(name, rounds=150, **options):
    logits = start()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, rounds)
    for _ in range(rounds):
        old_logps = token_logps(logits).detach()
        for _ in range(2):
            optimizer.zero_grad()
            group_loss(logits, old_logps, name, **options).backward()
            optimizer.step()
        schedule.step()
    return policy_of(logits)


@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_group_advantages_with_the_kl_in_the_reward_reach_the_optimum(name):
    assert distance(descend(name)) < 0.02


def slope_at(strings, name, **options):
    logits = logits_of(strings).requires_grad_()
    loss = group_loss(logits, token_logps(logits).detach(), name, **options)
    return torch.autograd.grad(loss, logits)[0].abs().max().item()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", GROUP_ADVANTAGES)
def test_with_the_kl_in_the_reward_the_optimum_stays_whatever_the_mean(name, aggregation):
    """There score - beta log(pi/pref) is beta log Z for every string: no advantage to weigh."""
    assert slope_at(OPTIMUM, name, aggregation=aggregation) < 1e-12
    away = per_string(REFERENCE).exp()
    assert slope_at(away, name, aggregation=aggregation) > 0.01


def myopic():
    """Fixed point of rloo with k2 in the loss: pref(a|s) exp(Q(s, a)/beta)/Z at each prefix, Q
    the mean score to come, since the gradient of k2 counts a token's own KL and not that of the
    tokens that it leads to. Backwards, from long prefixes to short ones."""
    reference = logits_of(per_string(REFERENCE).exp()).log_softmax(-1)
    reward, value = dict(zip(STRINGS, REWARD.tolist(), strict=True)), {}
    table = torch.empty_like(reference)
    for state in reversed(range(len(PREFIXES))):
        prefix = PREFIXES[state]
        ends = [(*prefix, a) for a in range(STOP + 1)]
        worth = torch.tensor([reward.get(e, value.get(e)) for e in ends], dtype=torch.float64)
        table[state] = (reference[state] + worth / BETA).log_softmax(-1)
        value[prefix] = (table[state].exp() * worth).sum().item()
    return policy_of(table)


def test_k2_in_the_loss_holds_each_token_but_not_what_it_leads_to():
    fixed = myopic()
    # In groups of two rloo's own loss; the mean over the group halves nothing here, since both
    # the surrogate and the KL are summed over it.
    assert slope_at(fixed, "rloo", kl_in_loss="k2") < 1e-12
    assert slope_at(OPTIMUM, "rloo", kl_in_loss="k2") > 1e-3
    assert distance(fixed) > 0.02


def test_grpo_as_published_does_not_reach_the_optimum():
    assert distance(descend("grpo", kl_in_loss="k3")) > 0.05


# One token, four arms, probabilities that a group of ten meets exactly: in a group that is as the
# policy is, fixed points of the scaled advantages have closed forms.

POLICY = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
ARMS = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
DRAWS = torch.arange(4).repeat_interleave(torch.tensor([1, 2, 3, 4]))


def bandit_slope(name, estimator, reference, arms=ARMS):
    logits = POLICY.log().requires_grad_()
    logps = logits.log_softmax(0)[DRAWS]
    advantages = GROUP_ADVANTAGES[name](arms[DRAWS], torch.zeros(10, dtype=torch.long))
    kl = KL_ESTIMATORS[estimator](logps, reference.log()[DRAWS])
    loss = clipped_surrogate(logps, logps.detach(), advantages) + BETA * kl
    return torch.autograd.grad(loss.mean(), logits)[0].abs().max().item()


def test_k2_in_the_loss_of_one_token_has_the_optimum_and_the_scale_of_grpo_another_beta():
    for name, beta in (("dr_grpo", BETA), ("grpo", BETA * (ARMS[DRAWS].std() + 1e-4))):
        assert bandit_slope(name, "k2", (POLICY.log() - ARMS / beta).softmax(0)) < 1e-12
    assert bandit_slope("grpo", "k2", (POLICY.log() - ARMS / BETA).softmax(0)) > 0.01


def test_k3_in_the_loss_of_one_token_has_another_optimum():
    """pi = beta pref / (beta - (r - mean r)), where every arm's r - mean r is below beta."""
    above = ARMS - (POLICY * ARMS).sum()
    arms = ARMS * BETA / (1.25 * above.max())
    reference = POLICY * (1 - above / (1.25 * above.max()))
    assert bandit_slope("dr_grpo", "k3", reference, arms) < 1e-12
    assert distance(POLICY, (reference.log() + arms / BETA).softmax(0)) > 0.05
