import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from oracles import SHAPES, alone, loaded, random_trees, tree_of
from tiny import byte_tokenizer, save_tiny, tiny_model
from upweight.errors import ModelError, OutputError, Refusal
from upweight.models import weights
from upweight.models.adapter import add_lora
from upweight.models.export import export, export_reward_model
from upweight.models.load import load
from upweight.models.scalar import tree_scores, with_scalar_head

TREES = random_trees(SHAPES)


def started(name):
    return load(str(name), device="cpu", dtype="float32")


def adapted(lm, seed=0, **options):
    """`lm` with an adapter that does something."""
    settings = dict(rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=seed)
    lm = add_lora(lm, **settings | options)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.1)
    return lm


def by_peft(folder):
    """The folder's model as plain transformers and peft load it, without upweight."""
    from peft import PeftModel

    base = json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with weights.quiet_peft():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def same(model, wanted):
    with torch.no_grad():
        torch.testing.assert_close(alone(model, TREES), wanted, rtol=1e-4, atol=1e-4)


def score(lm):
    from upweight.models.attention import native_attention

    with torch.no_grad(), native_attention(lm.causal):
        return alone(lm.model, TREES)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_on_an_adapter_is_exported_with_what_it_started_from(tmp_path, merge):
    base = save_tiny(str(tmp_path / "start"))
    export(adapted(started(base)), tmp_path / "first")
    lm = adapted(started(tmp_path / "first"), seed=7)
    (tmp_path / "run").mkdir()
    wanted = score(lm)
    written = export(lm, tmp_path / "run" / "model", merge=merge)
    names = ["model", "adapter", "base"] if merge else ["model", "base"]
    assert written == [tmp_path / "run" / name for name in names]
    same(by_peft(tmp_path / "run" / ("adapter" if merge else "model")), wanted)
    if merge:
        same(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), wanted)


def test_a_converted_start_is_written_beside_the_adapter_and_the_cache_is_not_named(tmp_path):
    lm = adapted(started(save_tiny(str(tmp_path / "cached"))))
    lm.name = "model.gguf"
    (tmp_path / "run").mkdir()
    wanted = score(lm)
    export(lm, tmp_path / "run" / "model")
    assert "cached" not in (tmp_path / "run" / "model" / "adapter_config.json").read_text()
    same(by_peft(tmp_path / "run" / "model"), wanted)


def test_a_base_that_runs_beside_each_other_have_is_one_file(tmp_path, monkeypatch):
    def exported(run, seed=0):
        (tmp_path / run).mkdir()
        if run != "mine":
            (tmp_path / run / "run.yaml").touch()
        lm = adapted(started(save_tiny(str(tmp_path / "cached"), seed=seed)))
        lm.name = "model.gguf"
        export(lm, tmp_path / run / "model")
        return (tmp_path / run / "base" / "model.safetensors").stat().st_ino

    # What is no run is somebody's own, and may be written into.
    own, first = exported("mine"), exported("1-dpo")
    assert exported("2-ppo") == first not in (own, exported("3-other", seed=1))

    def refuse(*names):
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    assert exported("4-dpo") != first
    written = {p.name for p in (tmp_path / "4-dpo" / "base").iterdir()}
    assert written == {p.name for p in (tmp_path / "1-dpo" / "base").iterdir()}


def test_a_run_that_was_moved_has_its_base_beside_the_adapter(tmp_path):
    lm = adapted(started(save_tiny(str(tmp_path / "cached"))))
    lm.name = "model.gguf"
    (tmp_path / "run").mkdir()
    wanted = score(lm)
    export(lm, tmp_path / "run" / "model")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    torch.testing.assert_close(score(started(moved / "model")), wanted, rtol=1e-4, atol=1e-4)
    (moved / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError) as caught:
        started(moved / "model")
    assert f"there is no folder {tmp_path}/run/base. It is the base of the adapter" in str(
        caught.value
    )
    assert f"and there is no {moved}/base either: put it there, or write" in str(caught.value)


def test_a_folder_beside_an_adapter_is_its_base_only_where_it_was_exported_there(tmp_path):
    lm = adapted(started(save_tiny(str(tmp_path / "start"))))
    (tmp_path / "run").mkdir()
    export(lm, tmp_path / "run" / "model")
    (tmp_path / "start").rename(tmp_path / "run" / "base")
    with pytest.raises(ModelError, match="there is no folder .*/start. .* It is the base of"):
        started(tmp_path / "run" / "model")


def test_an_adapter_names_a_local_base_by_its_whole_path(tmp_path, monkeypatch):
    save_tiny(str(tmp_path / "start"))
    monkeypatch.chdir(tmp_path)
    lm = adapted(started("start"))
    wanted = score(lm)
    export(lm, Path("model"))
    monkeypatch.chdir("/")
    same(by_peft(tmp_path / "model"), wanted)


def test_what_generation_stops_at_is_exported_with_the_merged_model(tmp_path):
    lm = adapted(started(save_tiny(str(tmp_path / "start"))))
    lm.causal.generation_config.eos_token_id = [0, 2]
    export(lm, tmp_path / "model", merge=True)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 2]


def test_an_adapter_on_an_untied_embedding_and_head_is_exported(tmp_path):
    lm = started(save_tiny(str(tmp_path / "start")))
    lm = adapted(lm, targets=["embed_tokens", "lm_head", "q_proj"])
    wanted = score(lm)
    export(lm, tmp_path / "model")
    same(by_peft(tmp_path / "model"), wanted)


def without(name):
    def lose(file):
        tensors = load_file(file)
        changed = {k: v * 0 if name in k else v for k, v in tensors.items()}
        assert any(name in k for k in tensors)
        save_file(changed, file, {"format": "pt"})

    return lose


def planted(lm, monkeypatch, spoil):
    """save_pretrained as it would be if it lost a part."""
    save = type(lm.model).save_pretrained

    def wrong(self, folder, **options):
        save(self, folder, **options)
        spoil(next(Path(folder).glob("*model.safetensors")))

    monkeypatch.setattr(type(lm.model), "save_pretrained", wrong)


@pytest.mark.parametrize(
    "lora, part", [(False, "embed_tokens"), (False, "lm_head"), (True, "lora_B")]
)
def test_an_export_that_lost_a_part_is_refused(tmp_path, monkeypatch, lora, part):
    lm = started(save_tiny(str(tmp_path / "start")))
    lm = adapted(lm) if lora else lm
    with monkeypatch.context() as patched:
        planted(lm, patched, without(part))
        with pytest.raises(Refusal, match=r"a token's log-prob \S+ nats off") as refused:
            export(lm, tmp_path / "model")
    assert refused.value.code == "UW401"
    assert [p.name for p in tmp_path.iterdir()] == ["start"]
    assert export(lm, tmp_path / "model") == [tmp_path / "model"]


def test_an_export_that_cannot_be_read_back_is_refused(tmp_path, monkeypatch):
    lm = started(save_tiny(str(tmp_path / "start")))
    planted(lm, monkeypatch, lambda file: file.write_bytes(file.read_bytes()[:500]))
    with pytest.raises(Refusal, match="cannot be read back") as refused:
        export(lm, tmp_path / "model")
    assert refused.value.code == "UW401"


def test_a_base_that_has_changed_on_disk_meanwhile_is_refused(tmp_path):
    lm = adapted(started(save_tiny(str(tmp_path / "start"))))
    save_tiny(str(tmp_path / "start"), seed=1)
    with pytest.raises(Refusal, match="UW401"):
        export(lm, tmp_path / "model")


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space")]
)
def test_a_disk_that_is_full_is_one_message(tmp_path, monkeypatch, error):
    lm = loaded()

    def full(file):
        raise error

    planted(lm, monkeypatch, full)
    with pytest.raises(OutputError, match=r"could not be written to .*model: .*No space"):
        export(lm, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def tied():
    lm = loaded("qwen2")
    lm.causal.config.tie_word_embeddings = True
    lm.causal.get_output_embeddings().weight = lm.causal.get_input_embeddings().weight
    return lm


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], r".*lm_head"])
def test_targets_on_a_matrix_that_is_embedding_and_head_at_once_are_refused(targets):
    with pytest.raises(ModelError, match="lora.targets .* is one matrix with"):
        adapted(tied(), targets=targets)
    assert adapted(tied()).has_adapter


def test_an_adapter_on_such_a_matrix_that_others_made_is_not_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    lm = tied()
    lm.model.save_pretrained(tmp_path / "start")
    lm.model.name_or_path = str(tmp_path / "start")
    with weights.quiet_peft():
        wrapped = get_peft_model(lm.model, LoraConfig(target_modules=["lm_head"]))
        wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="the adapter .* lm_head is one matrix with"):
        weights.load_weights("given", str(tmp_path / "adapter"))


def test_what_peft_refuses_is_said_in_its_words():
    with pytest.raises(
        ModelError, match="cannot be used on .*peft says: .*`r` should be a positive integer"
    ):
        adapted(loaded(), rank=0)
    with pytest.raises(ModelError, match="match no layer of .*peft says: .*qproj"):
        adapted(loaded(), targets=["qproj"])


PADDINGS = {
    "the stop token, with another special one": (("<|endoftext|>", "<|im_end|>"), "<|endoftext|>"),
    "the stop token, which is the only special one": (("<|im_end|>",), "\u0120"),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", PADDINGS)
def test_a_saved_reward_model_scores_batches_that_its_own_tokenizer_pads(tmp_path, case, side):
    specials, chosen = PADDINGS[case]
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] in specials]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token="<|im_end|>", pad_token="<|im_end|>", padding_side=side,
        extra_special_tokens=[s for s in specials if s != "<|im_end|>"],
    )  # fmt: skip
    # Absolute positions: padded in front, a text would stand elsewhere.
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stop = tokenizer.eos_token_id
    lm = with_scalar_head(started(tmp_path / "model"), {stop}, seed=1)
    answers = [[*tokenizer(text)["input_ids"], stop] for text in ("yes", "no, and so on")]
    tree = tree_of(tuple(tokenizer("a question")["input_ids"]), answers, ())
    folder = export_reward_model(lm, tmp_path / "reward", [tree])
    saved = AutoTokenizer.from_pretrained(folder)
    assert (saved.pad_token, len(saved)) == (chosen, len(tokenizer))
    texts = ["a questionyes<|im_end|>", "a questionno, and so on<|im_end|>"]
    assert [tokenizer(t)["input_ids"] for t in texts] == [saved(t)["input_ids"] for t in texts]
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config.pad_token_id == saved.pad_token_id
    rows = [[*tree.prompt, *answer] for answer in answers]
    with torch.no_grad():
        scores = plain(**saved.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
    assert scores.tolist() == pytest.approx(tree_scores(lm, [tree])[0], abs=1e-5)
