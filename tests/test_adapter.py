import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upweight.models.sample as sampling
import upweight.recipes.train as run_train
import upweight.training.objectives as objectives
from oracles import SHAPES, as_peft_has_it, gradients, loaded, random_trees, weigh
from runs import furnish, train
from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.models import nf4
from upweight.models.adapter import (
    Converted,
    adapter_off,
    add_lora,
    keep_frozen_in_compute_dtype,
    widened,
)
from upweight.models.load import fingerprint
from upweight.models.logprobs import token_logps
from upweight.models.proof import one_at_a_time, probe_forest
from upweight.recipes.state import computing

FOREST = collate(random_trees(SHAPES))


def adapted(family="llama", compute_dtype=torch.bfloat16, rounded=True):
    """With an adapter that says something; a base as one that was trained and saved in bf16."""
    lm = loaded(family)
    lm.compute_dtype = compute_dtype
    if rounded:
        lm.model.to(torch.bfloat16).to(torch.float32)
    lm = add_lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return lm


def narrow(lm):
    return {n for n, p in lm.model.named_parameters() if p.dtype == torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "phi3"])
def test_frozen_matrices_take_half_the_memory_and_give_the_same_numbers(family):
    wanted, got = adapted(family), adapted(family)
    keep_frozen_in_compute_dtype(got)
    kept = narrow(got)
    assert kept and all("base_layer.weight" in name for name in kept)
    ends = (got.causal.get_input_embeddings(), got.causal.get_output_embeddings())
    assert all(end.weight.dtype == torch.float32 for end in ends)
    ours, theirs = (token_logps(lm, FOREST) for lm in (got, wanted))
    assert torch.equal(ours, theirs)
    slopes = [gradients(lm.model, weigh(logps)) for lm, logps in ((got, ours), (wanted, theirs))]
    trained = [n for n, p in got.model.named_parameters() if p.requires_grad]
    assert trained and all(torch.equal(slopes[0][n], slopes[1][n]) for n in trained)
    with adapter_off(got) as one, adapter_off(wanted) as other:
        assert torch.equal(token_logps(one, FOREST), token_logps(other, FOREST))


def test_how_weights_are_kept_does_not_change_whose_they_are():
    lm = adapted()
    before = fingerprint(lm)
    keep_frozen_in_compute_dtype(lm)
    assert narrow(lm) and fingerprint(lm) == before
    with torch.no_grad():
        lm.causal.base_model.layers[0].mlp.up_proj.base_layer.weight[3, 5] += 1.0
    assert fingerprint(lm) != before


def test_a_matrix_that_would_lose_by_it_stays_as_it_is():
    lm = adapted()
    layer = lm.causal.base_model.layers[1].self_attn.q_proj.base_layer
    layer.weight.data[0, 0] = 1 + 2**-12
    keep_frozen_in_compute_dtype(lm)
    assert layer.weight.dtype == torch.float32 and len(narrow(lm)) == 13
    lm = adapted(rounded=False)
    keep_frozen_in_compute_dtype(lm)
    assert not narrow(lm)


def test_in_fp32_nothing_is_converted():
    lm = adapted(compute_dtype=torch.float32)
    keep_frozen_in_compute_dtype(lm)
    assert not narrow(lm)


class Apart(nn.Linear):
    """A layer that takes no part in autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), self.weight)


class Rounding(Apart):
    """One that reads its weights with fewer digits where it finds fewer."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x.float() @ self.weight.float().T * (1 + self.weight.itemsize)


@pytest.mark.parametrize("kind", [Apart, Rounding])
def test_a_family_whose_numbers_would_change_is_left_alone(kind):
    lm = adapted()
    lm.causal.base_model.layers[0].mlp.down_proj.base_layer.__class__ = kind
    before = token_logps(lm, FOREST)
    keep_frozen_in_compute_dtype(lm)
    assert not narrow(lm)
    assert torch.equal(token_logps(lm, FOREST), before)


def test_what_reads_its_weights_with_all_digits_is_not_converted_for_a_step():
    lm = adapted(rounded=False)
    assert Converted(lm).gives_the_same(lm)
    layer = lm.causal.base_model.layers[0].mlp
    layer.register_forward_hook(lambda m, given, out: out * m.down_proj.base_layer.weight.sum())
    assert not Converted(lm).gives_the_same(lm)


def test_widened_for_a_pass_in_full_precision_and_no_longer():
    lm = adapted()
    probe = probe_forest(lm)
    wanted = one_at_a_time(lm, probe)
    keep_frozen_in_compute_dtype(lm)
    kept = narrow(lm)
    with widened(lm):
        assert torch.equal(one_at_a_time(lm, probe), wanted)
    assert narrow(lm) == kept


def test_four_bits_without_their_package_name_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(
        ModelError, match=r"lora.quantize=nf4 needs .* pip install 'upweight\[nf4\]'"
    ):
        nf4.require_quantizer("nf4")
    nf4.require_quantizer(None)


def test_a_first_adapter_says_nothing_of_products_that_it_does_not_use() -> None:
    """In a process of its own: bitsandbytes speaks when it is first imported, by peft too."""
    script = (
        "import sys; sys.path.insert(0, 'tests'); from test_adapter import adapted; adapted(); "
        "import bitsandbytes"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_answers_are_drawn_from_matrices_that_are_converted_once_and_are_the_same_to_the_bit(
    monkeypatch,
):
    lm = adapted(rounded=False)
    frozen = {n: p for n, p in lm.model.named_parameters() if "base_layer" in n and p.ndim == 2}
    seen = set()

    def look(module, given):
        seen.add(module.weight.dtype)

    as_peft_has_it(lm)  # whose own forward calls the base
    handles = [
        m.register_forward_pre_hook(look)
        for n, m in lm.model.named_modules()
        if n.endswith("base_layer")
    ]
    before = {n: (p.data_ptr(), p.dtype) for n, p in frozen.items()}
    drawn = sampling.sample(lm, [[5, 6, 7], [8, 9]], num=3, max_new_tokens=6)
    assert seen == {torch.bfloat16}
    assert {n: (p.data_ptr(), p.dtype) for n, p in frozen.items()} == before
    seen.clear()
    monkeypatch.setattr(Converted, "in_place", lambda kept: contextlib.nullcontext())
    assert sampling.sample(lm, [[5, 6, 7], [8, 9]], num=3, max_new_tokens=6) == drawn
    assert seen == {torch.float32}
    for handle in handles:
        handle.remove()


def test_a_run_trains_through_converted_matrices_and_evaluates_its_own(tmp_path, monkeypatch):
    furnish(tmp_path, monkeypatch)
    seen = {"step": set(), "evaluation": set()}
    pair, evaluate = objectives.pair, run_train.evaluate_sets

    def dtypes(lm):
        return frozenset(m.weight.dtype for m in lm.causal.modules() if type(m) is nn.Linear)

    def looking(*given):
        objective = pair(*given)

        def step(lm, forest):
            seen["step"].add(dtypes(lm))
            return objective.step(lm, forest)

        return replace(objective, step=step)

    def evaluated(state, progress):
        seen["evaluation"].add(dtypes(state.lm))
        return evaluate(state, progress)

    monkeypatch.setattr(objectives, "pair", looking)
    monkeypatch.setattr(run_train, "evaluate_sets", evaluated)
    # Weights that bf16 does not hold: those that it holds are kept in it for good.
    usual = ("--lora", "--dtype", "bfloat16", "--steps", "2", "--fraction", "0.2")
    assert train("run", *usual) == 0
    assert all(torch.bfloat16 in found for found in seen["step"]) and seen["step"]
    assert seen["evaluation"] == {frozenset({torch.float32})}


def test_a_step_through_matrices_that_are_converted_once_is_the_same_to_the_bit():
    found = []
    for once in (False, True):
        lm = adapted(rounded=False)
        kept = Converted(lm)
        before = {n: (p.data_ptr(), p.dtype) for n, p in lm.model.named_parameters()}
        with kept.in_place() if once else contextlib.nullcontext():
            assert bool(narrow(lm)) == once
            found.append(gradients(lm.model, weigh(token_logps(lm, FOREST))))
        assert {n: (p.data_ptr(), p.dtype) for n, p in lm.model.named_parameters()} == before
    apart, together = found
    trained = [name for name in apart if "lora_" in name]
    assert trained and all(torch.equal(apart[name], together[name]) for name in trained)


def test_where_layers_are_recomputed_or_would_say_something_else_nothing_is_converted(monkeypatch):
    lm, recomputing = adapted(rounded=False), [False]

    def made():
        return computing([lm], lambda: recomputing[0])

    def converted(in_place) -> bool:
        with in_place():
            return bool(narrow(lm))

    in_place = made()
    assert converted(in_place) and not narrow(lm)
    # A step that ran out of memory makes it so, and the copies are given back for good.
    recomputing[0] = True
    assert not converted(in_place) and not converted(made())
    recomputing[0] = False
    assert not converted(in_place) and converted(made())
    monkeypatch.setattr(Converted, "gives_the_same", lambda kept, lm: False)
    assert not converted(made())
