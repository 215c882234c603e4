import json
import platform
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles import SHAPES, gradients, loaded, random_trees, relative, weigh
from tiny import FAMILIES, save_tiny, tiny_model
from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.models.adapter import add_lora
from upweight.models.load import bfloat16_is_fast, bit_sums, checkpoint_layers, fingerprint, load
from upweight.models.logprobs import token_logps
from upweight.models.named import cache_dir, resolve
from upweight.models.weights import load_weights


def refused(folder) -> str:
    with pytest.raises(ModelError) as error:
        load(str(folder), device="cpu", dtype="float32")
    return str(error.value)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(save_tiny(str(tmp_path / "model")))


@pytest.fixture
def adapter(tmp_path, folder) -> Path:
    lm = add_lora(
        load(str(folder), device="cpu", dtype="float32"),
        rank=2,
        alpha=4.0,
        dropout=0.0,
        targets=["q_proj", "v_proj"],
        seed=0,
    )
    lm.model.save_pretrained(tmp_path / "adapter")
    lm.tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_weight_that_the_files_lack_is_refused_and_not_drawn_at_random(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = refused(folder)
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in said and str(folder) in said


def test_more_layers_in_the_config_than_in_the_files_are_refused(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    assert "9 missing (model.layers.2." in refused(folder)


def test_more_layers_in_the_files_than_in_the_config_are_refused(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    assert "9 without a place (model.layers.1." in refused(folder)


def test_tied_weights_and_the_masks_of_older_versions_are_not_missed(tmp_path):
    folder = Path(save_tiny(str(tmp_path / "model"), "gpt_neox"))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
            tensors[f"gpt_neox.layers.{layer}.attention.{name}"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_weights("model", str(folder))
    tied = tmp_path / "tied"
    model = tiny_model("qwen2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_weights("tied", str(tied))


def test_an_adapter_whose_keys_match_nothing_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    renamed = {k.replace("self_attn", "attention"): v for k, v in load_file(file).items()}
    save_file(renamed, file)
    said = refused(adapter)
    assert "8 missing" in said and "8 without a place" in said


def test_an_adapter_that_would_be_applied_in_part_is_refused(adapter):
    edit(adapter / "adapter_config.json", target_modules=["q_proj"])
    assert "4 without a place (base_model.model.model.layers.0.self_attn.v_proj" in refused(adapter)


def test_an_adapter_that_names_itself_as_its_base_is_refused(adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "an adapter whose base is itself" in refused(adapter)


def test_an_adapter_whose_base_is_gone_is_refused_by_both_names(adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path="no/such/base")
    said = refused(adapter)
    assert "there is no folder no/such/base" in said and f"base of the adapter {adapter}" in said


def test_an_adapter_that_names_no_base_is_refused(adapter):
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    assert "does not say which model it is for" in refused(adapter)


def test_an_adapter_with_a_broken_config_is_refused(adapter):
    (adapter / "adapter_config.json").write_text('{"base_model_name')
    assert "cannot be loaded" in refused(adapter)


@pytest.mark.parametrize("size", [None, 0, 100])
def test_an_adapter_without_whole_weights_is_refused(adapter, size):
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(content[:size])
    assert "cannot be loaded" in refused(adapter)


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_weights_that_were_cut_off_are_refused(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "cannot be loaded" in refused(folder)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": "two"}, {"model_type": "no_such_family"}, {"hidden_size": 31}]
)
def test_a_config_that_makes_no_sense_is_refused(folder, changes):
    edit(folder / "config.json", **changes)
    assert "cannot be loaded" in refused(folder)


def test_an_encoder_decoder_is_refused(folder):
    edit(folder / "config.json", is_encoder_decoder=True)
    assert "is an encoder-decoder" in refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"x" * 99],
    ids=["empty", "magic", "counts", "other"],
)
def test_a_gguf_file_that_is_none_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setenv("UPWEIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf cannot be loaded" in refused(tmp_path / "model.gguf")
    assert not list(cache_dir().rglob("*config.json"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("x" * 300, "cannot be looked up: File name too long"),
        ("~nobody-of-that-name/model", "cannot be looked up"),
        ("nowhere/at/all", "there is no folder"),
        ("missing.gguf", "there is no file"),
    ],
)
def test_a_name_that_names_nothing_is_refused(name, said):
    with pytest.raises(ModelError, match=said):
        resolve(name)


def test_a_hub_id_that_cannot_be_fetched_is_refused_before_the_hub_is_asked(
    monkeypatch,
):
    def no_address(*_given):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    said = r"no folder some/model here, and \S+, where a hub id .* has no address \(Name or service"
    with pytest.raises(ModelError, match=said):
        resolve("some/model")
    with pytest.raises(ModelError, match="Give a model folder"):
        resolve("some-model")
    # What is kept here needs no address, and behind a proxy there may be none.
    monkeypatch.setattr("upweight.models.named.try_to_load_from_cache", lambda *_: "config.json")
    assert resolve("some/model") == "some/model"
    monkeypatch.setattr("upweight.models.named.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert resolve("some/model") == "some/model"


@pytest.mark.parametrize("answers", ["never", "the second time"])
def test_a_name_server_that_does_not_answer_is_asked_once_more(answers, monkeypatch):
    asked, waited = [], []

    def busy(*given):
        asked.append(given)
        if answers == "never" or len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return []

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", busy)
    monkeypatch.setattr("time.sleep", waited.append)
    if answers == "never":
        with pytest.raises(ModelError, match="has no address \\(Temporary failure"):
            resolve("some/model")
    else:
        assert resolve("some/model") == "some/model"
    assert len(asked) == 2 and len(waited) == 1


def test_a_misspelt_folder_is_named_with_the_one_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no folder runs/a/modle. Did you mean runs/a/model\?"):
        resolve("runs/a/modle")


def test_a_hub_id_is_one_whatever_lies_in_a_folder_of_its_first_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "modle").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("some/model") == "some/model"


def test_a_file_and_a_folder_without_a_config_are_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"it has no config.json \(it holds: notes.txt\)"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(tmp_path / "notes.txt"))


def test_a_tokenizer_that_cannot_be_read_or_is_empty_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "has no tokenizer that transformers can load" in refused(folder)


def test_a_fingerprint_takes_tensors_of_any_shape():
    lm = loaded()
    before = fingerprint(lm)
    lm.model.register_buffer("a_scale", torch.tensor(0.5))
    assert fingerprint(lm) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_a_tensors_bits_tells_any_of_them(dtype: torch.dtype):
    lm = loaded(dtype=dtype)
    # Shapes whose bytes are no multiple of eight, and one that begins between two eights.
    lm.model.register_buffer("a_scale", torch.tensor(0.5, dtype=dtype))
    lm.model.register_buffer("a_part", torch.ones(8, dtype=dtype)[1:])
    before = bit_sums(lm)
    assert bit_sums(lm) == before
    for name, tensor in lm.causal.state_dict().items():
        kept = tensor.clone()
        tensor.view(-1)[-1] *= 1 + 2**-6
        changed = {n for n, value in bit_sums(lm).items() if value != before[n]}
        assert changed == {name}
        tensor.copy_(kept)


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_a_layer_that_is_recomputed_draws_no_dropout(family):
    lm, forest = loaded(family), collate(random_trees(SHAPES))
    kept = token_logps(lm, forest)
    wanted = gradients(lm.model, weigh(kept))
    checkpoint_layers(lm)
    again = token_logps(lm, forest)
    assert torch.equal(again, kept)
    assert relative(gradients(lm.model, weigh(again)), wanted) < 1e-6


def test_the_test_of_dropout_has_dropout_to_find():
    assert tiny_model("opt").config.dropout == tiny_model("falcon").config.hidden_dropout == 0.1
    assert "opt" in FAMILIES


def test_bf16_is_not_chosen_for_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert not bfloat16_is_fast(torch.device("cpu"))
