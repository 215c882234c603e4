import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oracles import alone, tree_of, with_plan
from tiny import byte_tokenizer
from upweight.data.pack import collate
from upweight.evidence.evaluate import score_trees
from upweight.losses.pair import PAIR_LOSSES, dpo
from upweight.models.load import ForwardPlan, LanguageModel
from upweight.models.logprobs import response_logps, token_logps
from upweight.models.reference import fill, open_reference
from upweight.types import PairLogps, Preference

# Closed forms: Rafailov et al. 2023 (arXiv:2305.18290), sections 4 and A.


def pairs_of(policy_chosen, policy_rejected, reference_chosen=0.0, reference_rejected=0.0):
    values = torch.broadcast_tensors(
        *(
            torch.as_tensor(x, dtype=torch.float64).reshape(-1)
            for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        )
    )
    tokens = torch.full(values[0].shape, 7)
    return PairLogps(*values, tokens_chosen=tokens, tokens_rejected=tokens)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_where_policy_is_reference_the_loss_is_ln_2(smoothing):
    logps = pairs_of([-3.0, -500.0], [-4.0, -20.0], [-3.0, -500.0], [-4.0, -20.0])
    got = dpo(logps, beta=0.1, label_smoothing=smoothing)
    torch.testing.assert_close(got, torch.full_like(got, math.log(2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_the_gradient_is_beta_sigmoid_of_minus_beta_h(beta):
    chosen = torch.tensor([-3.0, -50.0, 2000.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-9.0, -10.0, -2000.0], dtype=torch.float64, requires_grad=True)
    logps = pairs_of(chosen, rejected, -4.0, -5.5)
    up, down = torch.autograd.grad(dpo(logps, beta=beta).sum(), (chosen, rejected))
    wanted = -beta * torch.sigmoid(-beta * logps.margin)
    torch.testing.assert_close(up, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(down, -wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_what_depends_on_the_prompt_alone_cancels(smoothing):
    shift = torch.tensor([0.0, 5.0, -40.0], dtype=torch.float64)
    plain = dpo(pairs_of(-3.0, -4.0, -3.5, -2.0), label_smoothing=smoothing)
    moved = dpo(pairs_of(-3.0 + shift, -4.0 + shift, -3.5, -2.0), label_smoothing=smoothing)
    torch.testing.assert_close(moved, plain.expand(3))


def test_cdpo_is_stationary_where_the_margin_explains_the_flips():
    h = torch.tensor([21.972246], dtype=torch.float64, requires_grad=True)
    loss = dpo(pairs_of(h, 0.0), beta=0.1, label_smoothing=0.1).sum()
    (slope,) = torch.autograd.grad(loss, h)
    assert abs(slope.item()) < 1e-9
    assert loss.item() == pytest.approx(0.3251, abs=5e-5)
    near = dpo(pairs_of([21.0, 23.0, 100.0], 0.0), beta=0.1, label_smoothing=0.1)
    assert (near > loss.item()).all()


def test_cdpo_is_dpo_under_flipped_labels():
    e, logps = 0.3, pairs_of([-3.0, -9.0], [-4.0, -2.0], -3.5, -2.5)
    flipped = pairs_of([-4.0, -2.0], [-3.0, -9.0], -2.5, -3.5)
    mixed = (1 - e) * dpo(logps) + e * dpo(flipped)
    torch.testing.assert_close(dpo(logps, label_smoothing=e), mixed)


def test_a_row_that_doubts_its_label_is_that_part_of_a_flipped_one():
    doubts = torch.tensor([0.0, 0.3], dtype=torch.float64)
    logps = pairs_of([-3.0, -9.0], [-4.0, -2.0], -3.5, -2.5)
    flipped = pairs_of([-4.0, -2.0], [-3.0, -9.0], -2.5, -3.5)
    mixed = (1 - doubts) * dpo(logps) + doubts * dpo(flipped)
    torch.testing.assert_close(dpo(replace(logps, flipped=doubts)), mixed)
    # With the doubt about all labels: it is wrong if one of the two turned it, and not the other.
    either = 0.1 * (1 - doubts) + 0.9 * doubts
    mixed = (1 - either) * dpo(logps) + either * dpo(flipped)
    both = dpo(replace(logps, flipped=doubts), label_smoothing=0.1)
    torch.testing.assert_close(both, mixed)


def test_far_margins_stay_finite():
    far = dpo(pairs_of([1e5, -1e5], 0.0), beta=0.1)
    torch.testing.assert_close(far, torch.tensor([0.0, 1e4], dtype=torch.float64))


def test_tabular_dpo_on_bradley_terry_converges_to_the_optimum():
    beta = 0.5
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    reward = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    first, second = (torch.tensor(x) for x in zip(*[(0, 1), (0, 2), (1, 2)], strict=True))
    better = torch.sigmoid(reward[first] - reward[second])
    free = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [free],
        max_iter=200,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        policy = free.log_softmax(0)
        forward = dpo(
            pairs_of(policy[first], policy[second], reference[first], reference[second]), beta=beta
        )
        backward = dpo(
            pairs_of(policy[second], policy[first], reference[second], reference[first]), beta=beta
        )
        loss = (better * forward + (1 - better) * backward).sum()
        loss.backward()
        return loss

    solver.step(closure)
    policy = free.detach().softmax(0)
    wanted = torch.tensor([0.183798, 0.814856, 0.001347], dtype=torch.float64)
    torch.testing.assert_close(policy, wanted, rtol=0, atol=1e-6)
    optimum = (reference + reward / beta).softmax(0)
    torch.testing.assert_close(policy, optimum, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_pair_loss_gives_one_value_per_pair_and_depends_on_no_other_pair(name):
    loss = PAIR_LOSSES[name]
    both = pairs_of([-3.0, -9.0], [-4.0, -2.0], [-3.5, -8.0], [-2.0, -2.5])
    alone = [pairs_of(-3.0, -4.0, -3.5, -2.0), pairs_of(-9.0, -2.0, -8.0, -2.5)]
    got = loss(both)
    assert got.shape == (2,)
    torch.testing.assert_close(got, torch.cat([loss(one) for one in alone]))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_pair_loss_takes_a_label_that_is_surely_flipped_for_the_other_one(name):
    loss, chosen, rejected = PAIR_LOSSES[name], (-3.0, -3.5), (-4.0, -2.0)
    said = pairs_of(chosen[0], rejected[0], chosen[1], rejected[1])
    other = pairs_of(rejected[0], chosen[0], rejected[1], chosen[1])
    surely = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(loss(replace(said, flipped=surely)), loss(other))


STOP, LONGEST = 0, 5


def tiny_language(seed):
    """A language model on the letters 1, 2, 3 and the stop token 0."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=STOP, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.7)
    cpu = torch.device("cpu")
    return LanguageModel(
        model, byte_tokenizer(), "tiny", "", cpu, torch.float32, ForwardPlan(attention="tiles")
    )


def all_strings():
    """Every string up to its stop token, and those that reach the longest length without one."""
    for length in range(LONGEST):
        for letters in product((1, 2, 3), repeat=length):
            yield (*letters, STOP)
    yield from product((1, 2, 3), repeat=LONGEST)


@pytest.mark.parametrize("way", [dict(attention="tiles"), dict(shared=False, reason="a test")])
def test_over_all_strings_of_a_language_implicit_rewards_normalise_the_reference(way, tmp_path):
    policy, start = (with_plan(tiny_language(seed), **way) for seed in (1, 2))
    strings, beta = list(all_strings()), 0.3
    assert len(strings) == sum(3**n for n in range(LONGEST)) + 3**LONGEST
    # Each string is in a preference, so that the rows give the implicit reward of all.
    tree = tree_of((1, 3, 2), strings, [Preference(k, 0) for k in range(1, len(strings))])

    reference = open_reference("f" * 64, start, tmp_path)
    fill(reference, start, [tree], tokens_per_bin=4096)
    forest = collate([tree])
    kept = response_logps(reference.logps(forest), forest).double()
    assert kept.exp().sum().item() == pytest.approx(1.0, abs=1e-6)  # kept in fp32

    # pi_ref one string at a time, the rewards as the package reports them: what both sides got
    # wrong alike would not cancel.
    rows = score_trees(policy, [tree], reference, beta, tokens_per_bin=4096)
    rewards = [rows[0]["reward_rejected"], *(row["reward_chosen"] for row in rows)]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    with torch.no_grad():
        pieces = alone(tiny_language(2).model, [tree]).split([len(s) for s in strings])
    exact = torch.stack([piece.sum() for piece in pieces])
    assert exact.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert (rewards / beta).abs().max() > 0.5
    assert (exact + rewards / beta).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_over_all_strings_of_a_language_probabilities_sum_to_1():
    lm = with_plan(tiny_language(1), attention="tiles")
    forest = collate([tree_of((1, 3, 2), list(all_strings()), preferences=())])
    with torch.no_grad():
        total = response_logps(token_logps(lm, forest), forest).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-9)


def test_the_sum_over_all_strings_is_not_1_without_the_stop_token():
    lm = with_plan(tiny_language(1), attention="tiles")
    tree = tree_of((1, 3, 2), list(all_strings()), preferences=())
    cut = replace(tree, responses=tuple(r[:-1] or r for r in tree.responses))
    forest = collate([cut])
    with torch.no_grad():
        total = response_logps(token_logps(lm, forest), forest).exp().sum().item()
    assert abs(total - 1) > 0.05
