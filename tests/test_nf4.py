"""Frozen layers in four bits: the numbers of plain layers that hold what the bits stand for."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oracles import SHAPES, as_peft_has_it, gradients, loaded, random_trees, relative, weigh
from runs import furnish, rows_of, train
from tiny import FAMILIES, save_tiny, tiny_model
from upweight.cli import main
from upweight.data.pack import collate
from upweight.errors import ModelError, Refusal
from upweight.models import nf4
from upweight.models.adapter import adapter_off, add_lora, keep_frozen_in_compute_dtype, widened
from upweight.models.export import export
from upweight.models.load import bit_sums, checkpoint_layers, fingerprint, load
from upweight.models.logprobs import token_logps
from upweight.models.proof import one_at_a_time, probe_forest
from upweight.models.reference import fill, open_reference, verify
from upweight.models.sample import sample
from upweight.models.weights import load_as_served, load_weights
from upweight.training.memory import plan_memory

functional = pytest.importorskip("bitsandbytes.functional")
TREES = random_trees(SHAPES)
FOREST = collate(TREES)
CPU = torch.device("cpu")
NF4 = ("--lora.quantize", "nf4")

SUMS = 1e-5
"""Between the same fp32 products in another order: sums of at most 96 terms, two layers deep, each
off by some 96 * 2^-24 = 6e-6 of what is summed at worst, and by a tenth of that as a rule."""


def quantized(family="llama", compute_dtype=torch.float32):
    """In four bits, with an adapter that says something."""
    lm = loaded(family)
    lm.compute_dtype = compute_dtype
    nf4.quantize_layers(lm.causal, CPU)
    return adapted(lm)


def adapted(lm):
    lm = add_lora(lm, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return lm


def dequantized(lm):
    """The oracle: plain layers with the weights that four bits stand for."""
    plain = deepcopy(lm)
    nf4.in_full(plain.model)
    assert not nf4.quantized_layers(plain.model)
    return plain


def difference(lm, plain):
    """Of log-probs, in nats, and of the adapter's gradient, relative to its norm."""
    ours, theirs = token_logps(lm, FOREST), token_logps(plain, FOREST)
    learned = [n for n, p in lm.model.named_parameters() if p.requires_grad]
    assert learned and all("lora_" in name for name in learned)
    slopes = [gradients(m.model, weigh(x)) for m, x in ((lm, ours), (plain, theirs))]
    found, wanted = ({name: slope[name] for name in learned} for slope in slopes)
    assert all(bool(slope.any()) for slope in wanted.values())
    return (ours - theirs).abs().max().item(), relative(found, wanted)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "phi3", "opt"])
def test_log_probs_and_gradients_are_those_of_plain_layers_with_the_rounded_weights(
    family, recomputed
):
    lm = quantized(family)
    plain = dequantized(lm)
    if recomputed:
        checkpoint_layers(lm)
    logps, slope = difference(lm, plain)
    assert logps < SUMS * 10 and slope < SUMS  # a log-prob is of the order of ten nats
    with adapter_off(lm) as one, adapter_off(plain) as other:
        torch.testing.assert_close(token_logps(one, FOREST), token_logps(other, FOREST))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bf16_they_are_what_autocast_makes_of_those_layers(family):
    lm = quantized(family, torch.bfloat16)
    logps, slope = difference(lm, as_peft_has_it(dequantized(lm)))
    assert (logps, slope) == (0.0, 0.0)


def test_an_error_in_one_scale_is_found_by_this_comparison():
    lm = quantized()
    plain = dequantized(lm)
    layer = nf4.quantized_layers(lm.model)[3]
    layer.scales.data[5] += 9
    logps, slope = difference(lm, plain)
    assert logps > 100 * SUMS and slope > 10 * SUMS


def by_definition(packed, state):
    """Of each weight its code's multiple of its block's scale."""
    scales = (
        state.offset
        + state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
        * (state.state2.code[state.absmax.long()])
    )
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scale = scales.repeat_interleave(64)[: codes.numel()]
    return (state.code[codes] * scale).view(state.shape)


@pytest.mark.parametrize("width", [32, 64, 96, 100, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_back_as_defined_whatever_the_width(width, dtype):
    # bitsandbytes 0.50.2 alone misreads widths of 32 and 96, where a block spans two rows.
    source = nn.Linear(width, 40, bias=False)
    packed, state = functional.quantize_4bit(
        source.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    got = nf4.Nf4Linear(source, CPU).dequantized(dtype)
    assert torch.equal(got, by_definition(packed, state).to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_and_weights_are_those_that_transformers_quantizes(tmp_path, family):
    folder = save_tiny(str(tmp_path), family)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**nf4.AS_CONFIG),
        device_map={"": "cpu"},
    )
    ours = tiny_model(family)
    nf4.quantize_layers(ours, CPU)
    wanted = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    got = {n: m for n, m in ours.named_modules() if isinstance(m, nf4.Nf4Linear)}
    assert got.keys() == wanted.keys()
    for name, layer in got.items():
        packed, state = wanted[name].weight.data, wanted[name].weight.quant_state
        assert torch.equal(layer.weight.data, packed)
        assert torch.equal(layer.dequantized(torch.float32), by_definition(packed, state))


def test_a_pass_without_gradient_leaves_the_layers_as_they_are():
    # bitsandbytes' own layer packs its weight anew there, and has no gradient from then on.
    lm = quantized()
    before = bit_sums(lm), fingerprint(lm)
    wanted = token_logps(lm, FOREST)
    with torch.no_grad():
        assert torch.equal(token_logps(lm, FOREST), wanted)
    sample(lm, [[5, 6, 7]], num=2, max_new_tokens=4)
    assert (bit_sums(lm), fingerprint(lm)) == before
    assert difference(lm, dequantized(lm))[1] < SUMS


def test_rounding_is_of_the_size_that_four_bits_have():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    source = nn.Linear(64, 96, bias=False)
    source.weight.data = weight.clone()
    read = nf4.Nf4Linear(source, CPU).dequantized(torch.float32)
    # For a normal distribution 16 quantiles are off by a tenth of its deviation, or somewhat less.
    assert 0.07 < float((read - weight).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize(
    "spoil",
    [
        lambda read: read.roll(64),
        lambda read: read.T.reshape(read.shape),
        lambda read: read * 1.2,
        lambda read: read.reshape(-1, 2).flip(1).reshape(read.shape),
    ],
    ids=["blocks", "order", "size", "halves of a byte"],
)
def test_a_kernel_that_reads_weights_back_wrongly_is_not_trained_on(monkeypatch, spoil):
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: spoil(right(*given)))
    with pytest.raises(ModelError, match="reads a .* matrix back on cpu .* more than rounding"):
        nf4.quantize_layers(tiny_model(), CPU)


def test_the_fingerprint_tells_quantized_from_whole_and_not_adapted_from_bare():
    whole, lm = loaded(), loaded()
    nf4.quantize_layers(lm.causal, CPU)
    bare = fingerprint(lm)
    assert bare != fingerprint(whole)
    assert fingerprint(quantized()) == bare
    keep_frozen_in_compute_dtype(lm := quantized(compute_dtype=torch.bfloat16))
    assert all(m.weight.dtype == torch.uint8 for m in nf4.quantized_layers(lm.model))
    probe = probe_forest(lm)
    wanted = one_at_a_time(lm, probe)
    with widened(lm):
        assert torch.equal(one_at_a_time(lm, probe), wanted)


def test_a_reference_of_the_whole_model_in_the_place_of_the_rounded_one_is_found(tmp_path):
    whole, lm = loaded(), loaded()
    nf4.quantize_layers(lm.causal, CPU)
    kept = open_reference(fingerprint(whole), whole, tmp_path)
    fill(kept, whole, TREES, 64)
    own = open_reference(fingerprint(lm), lm, tmp_path)
    assert own.missing(TREES) == TREES  # nothing of it is taken for this model's
    wrong = replace(kept, fingerprint=own.fingerprint, table={})
    wrong.take(FOREST, kept.logps(FOREST))
    with pytest.raises(Refusal, match="UW107"):
        verify(wrong, lm, TREES)
    fill(own, lm, TREES, 64)
    assert verify(own, lm, TREES) < 1e-4


def test_weights_are_counted_whole_and_their_bytes_as_they_are():
    lm = quantized()
    trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in loaded().model.parameters())
    assert nf4.num_weights(lm.model) == whole + trained
    layers = nf4.quantized_layers(lm.model)
    inside = sum(x.in_features * x.out_features for x in layers)
    plan = plan_memory(lm, TREES, [range(len(TREES))], 64)
    # Half a byte each, one for each block, and 256 numbers and a mean for each layer.
    scales = sum(-(-x.in_features * x.out_features // 64) for x in layers)
    ranges = sum(4 * -(-x.scales.numel() // 256) for x in layers)
    assert plan.weights == (
        4 * (whole - inside + trained) + inside // 2 + scales + ranges + len(layers) * 4 * 257
    )


def started(folder):
    return load(str(folder), device="cpu", dtype="float32", quantize="nf4")


def whole_scores(model):
    lm = replace(loaded(), model=model.eval())
    return one_at_a_time(lm, FOREST)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_an_export_is_the_trained_model_to_everyone_who_reads_it(tmp_path, family, merge):
    lm = adapted(started(save_tiny(str(tmp_path / "start"), family)))
    wanted = one_at_a_time(lm, FOREST)
    (tmp_path / "run").mkdir()
    written = export(lm, tmp_path / "run" / "model", merge=merge)
    adapter = tmp_path / "run" / ("adapter" if merge else "model")
    assert adapter in written and nf4.is_for_quantized(adapter)
    names = [p.name for p in adapter.parent.rglob(nf4.FILE)]
    assert names == [nf4.FILE]
    read = [load_as_served(adapter, CPU, False), load_weights("given", str(adapter))]
    if merge:
        read.append(AutoModelForCausalLM.from_pretrained(written[0], dtype=torch.float32))
    for model in read:
        torch.testing.assert_close(whole_scores(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_start_that_was_merged_is_written_whole_and_rounded_when_it_is_read(tmp_path):
    from test_export import adapted as with_adapter
    from test_export import started as begun

    export(with_adapter(begun(save_tiny(str(tmp_path / "start")))), tmp_path / "first")
    lm = adapted(started(tmp_path / "first"))
    wanted = one_at_a_time(lm, FOREST)
    (tmp_path / "run").mkdir()
    export(lm, tmp_path / "run" / "model")
    read = load_as_served(tmp_path / "run" / "model", CPU, False)
    torch.testing.assert_close(whole_scores(read), wanted, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")
    assert not nf4.quantized_layers(base)


def test_an_adapter_that_does_not_say_what_its_base_is_rounded_to_is_no_export(
    tmp_path, monkeypatch
):
    lm = adapted(started(save_tiny(str(tmp_path / "start"))))
    with monkeypatch.context() as patched:
        patched.setattr(nf4, "write_quantization", lambda folder: None)
        with pytest.raises(Refusal, match="a token's log-prob .* nats off") as refused:
            export(lm, tmp_path / "model")
    assert refused.value.code == "UW401"
    export(lm, tmp_path / "model")
    said = json.loads((tmp_path / "model" / nf4.FILE).read_text())
    (tmp_path / "model" / nf4.FILE).write_text(json.dumps(said | {"bnb_4bit_quant_type": "fp4"}))
    with pytest.raises(ModelError, match="does not say nf4 as upweight writes it"):
        load_weights("given", str(tmp_path / "model"))


def test_a_family_with_linear_layers_of_its_own_is_refused():
    with pytest.raises(ModelError, match="lora.quantize=nf4: the model has no linear layer"):
        nf4.quantize_layers(tiny_model("falcon"), CPU)


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    furnish(tmp_path, monkeypatch)


@pytest.mark.usefixtures("_folder")
def test_a_run_starts_at_its_rounded_reference_samples_exports_and_is_scored(capsys):
    assert train("run", *NF4) == 0
    said = capsys.readouterr().err
    assert "in nf4" in said and "BitsAndBytesConfig" in said
    records = rows_of("run/metrics.jsonl")
    first, *_, last = [r for r in records if r["kind"] == "eval"]
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert last["rewards/margins"] > 0
    # To fp32's last digit: every log-ratio is 0 exactly.
    step = next(r for r in records if r["kind"] == "train")
    assert step["loss"] == pytest.approx(first["loss"], abs=1e-8)
    assert step["rewards/margins"] == step["rewards/chosen"] == 0
    assert len(rows_of("run/samples.jsonl")) > 0
    assert train("whole", "--lora", "true") == 0
    prints = [
        json.loads(Path(run, "environment.json").read_text())["reference_fingerprint"]
        for run in ("run", "whole")
    ]
    assert prints[0] != prints[1]
    assert main(["check", "--model", "run/model", "--dtype", "float32"]) == 0
    words = "score --model run/model --data pairs.jsonl --dtype float32 --out scores.jsonl"
    assert main(words.split()) == 0
    # The run's own last evaluation says the same of the rows that it held out.
    assert len(rows_of("scores.jsonl")) == 24


@pytest.mark.usefixtures("_folder")
def test_a_reference_that_is_named_is_rounded_as_the_policy_is():
    assert train("run", *NF4, "--reference", "model", "--steps", "1") == 0
    first = next(r for r in rows_of("run/metrics.jsonl") if r["kind"] == "eval")
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.usefixtures("_folder")
def test_what_was_learned_in_four_bits_is_not_rounded_away_by_a_second_run(capsys):
    assert train("run", *NF4, "--steps", "1") == 0
    assert train("again", *NF4, "--model", "run/model") == 2
    assert "Leave out lora.quantize to train on from it" in capsys.readouterr().err
    assert train("again", "--lora", "true", "--model", "run/model", "--steps", "1") == 0


@pytest.mark.usefixtures("_folder")
def test_a_run_resumes_with_its_own_quantization_and_no_other(capsys):
    assert train("run", *NF4, "--steps", "2", "--checkpoint.every", "1") == 0
    newest = sorted(Path("run/checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    capsys.readouterr()
    assert main(["train", "run/run.yaml", "resume=true", "lora.quantize=null"]) == 2
    assert "lora.quantize is None here and was nf4" in capsys.readouterr().err
    assert main(["train", "run/run.yaml", "resume=true"]) == 0


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("objective", ["reward", "ppo", "sft"])
def test_other_objectives_train_on_layers_in_four_bits(objective):
    more = ["--objective", objective, *NF4]
    if objective == "ppo":
        Path("letters.py").write_text("def score(prompt, response, row):\n    return len(response)")
        more += [
            "--reward",
            "letters.py:score",
            "--prompts_per_round",
            "4",
            "--rollout.max_tokens",
            "6",
        ]
        more += ["--steps", "4"]
    settings = "--model model --data pairs.jsonl --learning-rate 1e-3 --dtype float32 --out run"
    assert main(["train", *settings.split(), *more]) == 0
    assert Path("run/report.html").is_file()
