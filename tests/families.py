"""Tokenizers and chat templates in the manner of the model families, built in code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny import CHATML
from upweight.data.account import REASONS
from upweight.data.formats import example_of
from upweight.data.render import make_renderer
from upweight.data.trees import tree
from upweight.types import Dropped, Example, RowId

ROW = RowId("train.jsonl", 7)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair_of(prompt="Why?", chosen="Because.", rejected="No.", **more):
    example = example_of(
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}, ROW, "pair"
    )
    assert isinstance(example, Example)
    return example


def grown(example, tok, **options):
    found = tree(example, make_renderer(tok, **options))
    assert not isinstance(found, Dropped), found
    return found


def reason(example, tok, **options):
    found = tree(example, make_renderer(tok, **options))
    assert isinstance(found, Dropped) and found.row == ROW, found
    assert found.reason in REASONS and found.detail
    found.detail.encode()
    return found.reason


def texts(found, tok):
    """Prompt and responses decoded, special tokens included."""
    return [tok.decode(list(ids)) for ids in (found.prompt, *found.responses)]


def tokenizer(specials=(), merges=(), template=None, eos=None, bos=None, lead=(), plain=()):
    """Bytes, with the merges given; `lead` are the tokens that it puts before every text, `plain`
    added tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate((*specials, *plain, *alphabet))}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(specials))
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if lead:
        bpe.post_processor = processors.TemplateProcessing(
            single=" ".join([*lead, "$A"]), special_tokens=[(t, vocab[t]) for t in lead]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token=bos)
    fast.chat_template = template
    return fast


LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == "
    "'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else "
    "m.role) + '\n' + m.content|trim + '<end_of_turn>\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content + ('<|return|>' if loop.last "
    "and m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# As Llama 3.2 does, a variable of its own comes before the clock, and the clock before a fixed day.
LLAMA32 = (
    "{%- if not date_string is defined %}\n    {% if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {% else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n    {% endif %}\n{% endif %}\n"
    "{{- '<|begin_of_text|>' }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + "
    "date_string + '\n\n<|eot_id|>' }}" + LLAMA3.removeprefix("{{ '<|begin_of_text|>' }}")
)
GRANITE = (
    "{% macro opening() %}{{ '<|im_start|>system\nToday\\'s Date: ' + strftime_now(format='%B %-d, "
    "%Y') + '.<|im_end|>\n' }}{% endmacro %}{{ opening() }}"
) + CHATML
NO_HEADER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
L3 = tuple(
    f"<|{name}|>"
    for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
)

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + "
    "'<｜end▁of▁sentence｜>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.strip() + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# With thoughts switched off the generation prompt already holds an empty one.
QWEN3_OFF = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == "
    "'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


@dataclass(frozen=True)
class Family:
    """A tokenizer with its chat template, the stops of the model's generation config, and what is
    expected of {user: "Why?", assistant: "Because."} on the day `date`."""

    tokenizer: PreTrainedTokenizerFast
    prompt: str
    response: str
    stops: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    appended: bool = False
    date: str | None = None

    @property
    def renderer_options(self) -> dict[str, Any]:
        ids = self.tokenizer.convert_tokens_to_ids(list(self.stops))
        return {"stop_token_ids": ids, "template_options": self.options, "date": self.date}

    @property
    def trims(self) -> bool:
        return "trim" in self.tokenizer.chat_template or "strip()" in self.tokenizer.chat_template


FAMILIES = {
    "chatml": Family(
        tokenizer(IM, template=CHATML, eos="<|im_end|>"),
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
    ),
    "chatml whose stop is not its eos": Family(
        tokenizer(IM, template=CHATML, eos="<|endoftext|>"),
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
    ),
    "llama 3": Family(
        tokenizer(L3, template=LLAMA3, eos="<|end_of_text|>", bos=L3[0], lead=L3[:1]),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Because.<|eot_id|>",
    ),
    "qwen 3": Family(
        tokenizer(IM, template=QWEN3, eos="<|im_end|>", plain=("<think>", "</think>")),
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nBecause.<|im_end|>",
    ),
    "qwen 3 with thoughts switched off": Family(
        tokenizer(IM, template=QWEN3_OFF, eos="<|im_end|>", plain=("<think>", "</think>")),
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Because.<|im_end|>",
        options={"enable_thinking": False},
    ),
    "gemma": Family(
        tokenizer(
            ("<bos>", "<eos>", "<start_of_turn>"),
            template=GEMMA,
            eos="<eos>",
            bos="<bos>",
            lead=("<bos>",),
            plain=("<end_of_turn>",),
        ),
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "Because.<end_of_turn>",
        ("<eos>", "<end_of_turn>"),
    ),
    "mistral": Family(
        tokenizer(("<s>", "</s>"), template=MISTRAL, eos="</s>", bos="<s>", lead=("<s>",)),
        "<s>[INST] Why? [/INST]",
        " Because.</s>",
    ),
    "phi 3, which writes two stops": Family(
        tokenizer(
            ("<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
            template=PHI3,
            eos="<|endoftext|>",
        ),
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        "Because.<|end|>",
    ),
    "deepseek": Family(
        tokenizer(DS, template=DEEPSEEK, eos=DS[1], bos=DS[0], lead=DS[:1]),
        "<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>",
        "Because.<｜end▁of▁sentence｜>",
    ),
    "strips white space": Family(
        tokenizer(IM, template=STRIPS, eos="<|im_end|>"),
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
    ),
    "harmony": Family(
        tokenizer(
            ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
            template=HARMONY,
            eos="<|return|>",
        ),
        "<|start|>user<|message|>Why?<|end|><|start|>assistant",
        "<|channel|>final<|message|>Because.<|return|>",
    ),
    "no generation prompt": Family(
        tokenizer(IM, template=NO_HEADER, eos="<|im_end|>"),
        "<|im_start|>user\nWhy?<|im_end|>\n",
        "<|im_start|>assistant\nBecause.<|im_end|>",
    ),
    "llama 3.2, which writes the date": Family(
        tokenizer(L3, template=LLAMA32, eos="<|end_of_text|>", bos=L3[0], lead=L3[:1]),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 09 Jul 2024"
        "\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Because.<|eot_id|>",
        date="2024-07-09",
    ),
    "granite, which writes the date in a macro": Family(
        tokenizer(IM, template=GRANITE, eos="<|endoftext|>"),
        "<|im_start|>system\nToday's Date: July 9, 2024.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
        date="2024-07-09",
    ),
    "no stop token": Family(
        tokenizer(IM, template=NO_STOP, eos="<|endoftext|>"),
        "user: Why?\nassistant:",
        " Because.<|endoftext|>",
        appended=True,
    ),
}

# Templates that write another prompt once an answer follows.
UNSTABLE = {
    "counts its messages": tokenizer(IM, template="{{ messages|length }}" + CHATML, eos=IM[2]),
    "deepseek that begins a thought": tokenizer(
        DS,
        template=DEEPSEEK.replace(
            "'<｜Assistant｜>' }}{% endif", "'<｜Assistant｜><think>\\n' }}{% endif"
        ),
        eos=DS[1],
        bos=DS[0],
    ),
    "another end for the last turn": tokenizer(
        IM,
        template=CHATML.replace(
            "<|im_end|>", "{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}"
        ),
        eos=IM[2],
    ),
}
