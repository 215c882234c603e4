import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles import (
    SHAPES,
    alone,
    gradients,
    loaded,
    plain_model,
    random_trees,
    relative,
    tree_of,
    weigh,
    with_plan,
)
from tiny import FAMILIES, save_tiny
from upweight.data.pack import bins, collate, merge_same_prompts
from upweight.errors import ModelError
from upweight.models.adapter import adapter_off, add_lora
from upweight.models.export import export
from upweight.models.load import checkpoint_layers, fingerprint, load
from upweight.models.logprobs import response_logps, token_logps
from upweight.models.reference import fill, open_reference
from upweight.models.sample import tree_logps

SOME = ["llama", "gemma3_text", "gpt2"]
TREES = random_trees(SHAPES + ((3, 2, 2), (20, 1, 9)), seed=3)


def sums(lm, trees):
    forest = collate(trees)
    return list(
        response_logps(token_logps(lm, forest), forest).split([len(t.responses) for t in trees])
    )


def close(got, wanted, tolerance=1e-10):
    for one, other in zip(got, wanted, strict=True):
        one, other = torch.as_tensor(one).to(other), torch.as_tensor(other)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", SOME)
def test_the_order_of_packing_changes_nothing(family):
    lm = loaded(family, torch.float64)
    wanted = sums(lm, TREES)
    for seed in range(3):
        order = torch.randperm(len(TREES), generator=torch.Generator().manual_seed(seed)).tolist()
        got = sums(lm, [TREES[i] for i in order])
        close(got, [wanted[i] for i in order])


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("capacity", [1, 40, 60, 10_000])
def test_the_capacity_of_bins_changes_nothing(family, capacity):
    lm = loaded(family)
    with torch.no_grad():
        wanted = sums(lm, TREES)
    close(tree_logps(lm, TREES, tokens_per_bin=capacity), wanted, 1e-5)
    assert len(bins(TREES, 40)) > len(bins(TREES, 10_000)) == 1


@pytest.mark.parametrize("family", SOME)
def test_responses_that_share_a_prompt_are_as_in_rows_of_their_own(family):
    lm = loaded(family, torch.float64)
    rows = [tree_of(t.prompt, [r], ()) for t in TREES for r in t.responses]
    merged = merge_same_prompts(rows)
    assert [t.responses for t in merged] == [t.responses for t in TREES]
    shared, separate = torch.cat(sums(lm, merged)), torch.cat(sums(lm, rows))
    close([shared], [separate])
    wanted = gradients(lm.model, weigh(separate))
    tolerance = 1e-10 if family == "gpt2" else 1e-6  # RMSNorm is fp32 in a float64 model too
    assert relative(gradients(lm.model, weigh(shared)), wanted) < tolerance


@pytest.mark.parametrize("way", [dict(attention="tiles"), dict(shared=False, reason="a test")])
def test_the_company_of_a_row_never_changes_its_log_prob(way):
    lm = with_plan(loaded(dtype=torch.float64), **way)
    wanted = torch.cat([s for tree in TREES for s in sums(lm, [tree])])
    close([torch.cat(sums(lm, TREES))], [wanted])


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_layers_in_the_backward_pass_changes_nothing(family):
    lm, forest = loaded(family), collate(TREES)
    kept = token_logps(lm, forest)
    wanted = gradients(lm.model, weigh(kept))
    checkpoint_layers(lm)
    recomputed = token_logps(lm, forest)
    assert torch.equal(recomputed, kept)
    assert relative(gradients(lm.model, weigh(recomputed)), wanted) < 1e-6


def adapted(family="llama", **options):
    lm = loaded(family)
    settings = dict(rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    return lm, add_lora(lm, **settings | options)


def stir(lm):
    """An adapter that does something: B is zero at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)


@pytest.mark.parametrize("family", SOME)
def test_cached_reference_is_live_reference_is_adapter_off(tmp_path, family):
    before = loaded(family)
    forest = collate(TREES)
    with torch.no_grad():
        live = token_logps(before, forest)
    lm = adapted(family)[1]
    with torch.no_grad():
        torch.testing.assert_close(token_logps(lm, forest), live)
    stir(lm)
    assert fingerprint(lm) == fingerprint(before)
    with torch.no_grad():
        assert (token_logps(lm, forest) - live).abs().max() > 1e-2
    with adapter_off(lm) as off:
        torch.testing.assert_close(token_logps(off, forest), live)
        reference = open_reference(fingerprint(lm), lm, tmp_path)
        fill(reference, off, TREES, 60)
    torch.testing.assert_close(reference.logps(forest), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", SOME)
def test_an_adapter_saved_loaded_and_merged_is_the_adapter(tmp_path, family):
    base = save_tiny(str(tmp_path / "base"), family)
    lm = load(base, device="cpu", dtype="float32")
    lm = add_lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    stir(lm)
    with torch.no_grad():
        wanted = token_logps(lm, collate(TREES))
    assert export(lm, tmp_path / "lora") == [tmp_path / "lora"]
    assert export(lm, tmp_path / "merged", merge=True) == [
        tmp_path / "merged",
        tmp_path / "adapter",
    ]
    for folder in ("lora", "merged", "adapter"):
        again = load(str(tmp_path / folder), device="cpu", dtype="float32")
        assert not again.has_adapter
        with torch.no_grad():
            got = token_logps(again, collate(TREES))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(alone(plain, TREES), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_the_same_model_to_plain_transformers(tmp_path, family):
    lm = loaded(family)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        wanted = token_logps(lm, collate(TREES))
        start = alone(plain_model(family), TREES)
    assert (wanted - start).abs().max() > 1e-2
    export(lm, tmp_path / "model")
    export(lm, tmp_path / "model")  # over what is there
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(alone(plain, TREES), wanted, rtol=1e-5, atol=2e-5)


def test_dropout_in_an_adapter_leaves_the_reference_without_noise():
    lm = adapted(dropout=0.5)[1]
    stir(lm)
    forest = collate(TREES)
    with adapter_off(lm) as off:
        assert torch.equal(token_logps(off, forest), token_logps(off, forest))


def test_targets_that_match_no_layer_are_refused_with_the_layers_names():
    with pytest.raises(ModelError, match="lora.targets .* its linear layers are called: .*q_proj"):
        adapted(targets=["qproj"])
