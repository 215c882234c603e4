"""Two-layer random models of several families and a byte tokenizer, built in code."""

from __future__ import annotations

from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIALS) + 1  # one spare id, so that no tokenizer id is the last logit


def byte_tokenizer(
    template: str | None = CHATML, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """One token a byte, plus three special tokens; ChatML unless told otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", bos_token=None
    )
    fast.chat_template = template
    return fast


_SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=0,
)
_GROUPED = dict(num_key_value_heads=2, head_dim=8)
FAMILIES: dict[str, dict] = {
    "llama": dict(**_SIZES, **_GROUPED),
    "qwen2": dict(**_SIZES, num_key_value_heads=2),
    "qwen3": dict(**_SIZES, **_GROUPED),
    "gemma2": dict(**_SIZES, **_GROUPED, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3_text": dict(
        **_SIZES,
        **_GROUPED,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": dict(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=2,
    ),
    "gpt_neox": dict(**_SIZES),
    "phi3": dict(**_SIZES, num_key_value_heads=2),
    "mistral": dict(**_SIZES, **_GROUPED, sliding_window=8),
    # Its own dropout of 0.1, which its layers apply themselves, stays in its config.
    "opt": dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
}
FALLBACK_FAMILIES: dict[str, dict] = {
    "mamba": dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "bloom": dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "falcon": dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random two-layer model, in evaluation mode. Weights are larger than the usual initial
    ones, so that log-probs differ by nats and a wrong mask or shift shows."""
    sizes = (FAMILIES | FALLBACK_FAMILIES)[family]
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith(("A_log", "conv1d.weight")):
                parameter.normal_(0.0, 0.15)
    return model.eval()


@lru_cache
def warm_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def save_tiny(folder: str, family: str = "llama", seed: int = 0) -> str:
    """A model folder that loads with plain transformers; returns its path."""
    tiny_model(family, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
