"""The table of keys: their full and short names, what each takes, and their command-line flags."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from upweight.config.base import Section
from upweight.config.sections import SECTIONS, Run
from upweight.config.written import parse_value, write
from upweight.errors import nearest

SWITCHED = "lora"
"""The one section that may be off; its own name is a key too, true or false."""

STAGES = "stages"
"""What is no key of a run: a list of runs, one after the other (stages.py)."""

METHODS = "methods"
"""What is no key of a run either: several of them by name, to be compared (methods.py)."""


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of the configuration.

    `kind` says in words what it takes, `choices` are the words it takes if it takes only some.
    `is_text`: unquoted numbers are text here. `many`: it takes a list.
    """

    full: str
    section: str
    name: str
    kind: str
    choices: tuple[str, ...]
    is_text: bool
    many: bool
    default: str
    description: str


@dataclass(frozen=True, slots=True)
class Flag:
    """One leaf as a command-line flag.

    `many` flags take one or more words; a `switch` may stand alone and then means true.
    """

    key: str
    section: str
    names: tuple[str, ...]
    type: str
    default: str
    description: str
    many: bool
    switch: bool


@cache
def keys() -> dict[str, Key]:
    """Every leaf by its full name, in the order of a run.yaml; the switch of LoRA among them."""
    table = {key.full: key for key in _keys_of("", Run)}
    for section, model in SECTIONS.items():
        if section == SWITCHED:
            about = "Train LoRA adapters in place of all weights; any lora key switches it on."
            kind = "true or false"
            table[section] = Key(section, section, section, kind, (), False, False, "false", about)
        table |= {key.full: key for key in _keys_of(section, model)}
    return table


def _keys_of(section: str, model: type[Section]) -> list[Key]:
    schemas: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    found: list[Key] = []
    for name, field in model.model_fields.items():
        if name in SECTIONS and model is Run:
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        found.append(
            Key(
                full=f"{section}.{name}" if section else name,
                section=section,
                name=name,
                kind=_kind(schemas[name]),
                choices=tuple(_choices(schemas[name])),
                is_text=_is_text(schemas[name]),
                many=any(part.get("type") == "array" for part in _parts(schemas[name])),
                default="required" if field.is_required() else write(default),
                description=field.description or "",
            )
        )
    return found


def _parts(schema: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return schema.get("anyOf", [schema])


def _choices(schema: Mapping[str, Any]) -> list[str]:
    if "anyOf" in schema:
        return [word for part in schema["anyOf"] for word in _choices(part)]
    if "items" in schema:
        return _choices(schema["items"])
    return schema.get("enum", [schema["const"]] if "const" in schema else [])


def _is_text(schema: Mapping[str, Any]) -> bool:
    inner = schema.get("items") or schema.get("additionalProperties")
    if isinstance(inner, dict):
        return _is_text(inner)
    return any(part.get("type") == "string" for part in _parts(schema))


BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
WORDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}


def _kind(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    choices = _choices(schema)
    if schema.get("type") == "array":
        texts = f"a list of {_listing(choices)}" if choices else "a list of texts"
        return f"{texts} (not empty)" if "minItems" in schema else texts
    if schema.get("type") == "object":
        holds = "text or a list of texts" if _is_text(schema) else "value"
        return f"a mapping {{name: {holds}}}"
    if choices:
        return _listing(choices)
    if schema.get("format") == "date":
        return "a day such as 2026-11-29"
    bounds = [f"{sign} {schema[name]}" for name, sign in BOUNDS.items() if name in schema]
    return f"{WORDS[schema['type']]} {' and '.join(bounds)}".strip()


def _listing(words: Sequence[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} or {last}" if rest else last


def candidates(typed: str) -> list[str]:
    """The full names that `typed` may stand for: none, one, or several if it is ambiguous."""
    if typed in keys():
        return [typed]
    if typed == "data":
        return ["data.path"]
    return [key.full for key in keys().values() if key.name == typed]


ELSEWHERE = {
    "model": ("model_name_or_path",),
    "reference": ("ref_model", "ref_model_name_or_path", "reference_model"),
    "out": ("output_dir",),
    "objective": ("loss_type",),
    "epochs": ("num_train_epochs", "num_epochs"),
    "steps": ("max_steps",),
    "resume": ("resume_from_checkpoint",),
    "track": ("report_to",),
    "log_every": ("logging_steps",),
    "data.path": ("dataset", "dataset_name", "datasets", "train_file", "train_dataset"),
    "data.template": ("chat_template",),
    "data.template_options": ("chat_template_kwargs",),
    "data.max_length": ("max_prompt_length", "max_completion_length", "max_seq_length",
                        "cutoff_len", "sequence_len"),
    "data.truncation": ("truncation_mode",),
    "data.limit": ("max_samples", "max_train_samples"),
    "batch.pairs_per_step": ("per_device_train_batch_size", "train_batch_size", "batch_size",
                             "gradient_accumulation_steps", "micro_batch_size"),
    "batch.tokens_per_bin": ("per_device_eval_batch_size", "packing", "padding_free"),
    "optimizer.max_grad_norm": ("gradient_clipping",),
    "optimizer.warmup": ("warmup_ratio", "warmup_steps"),
    "optimizer.schedule": ("lr_scheduler_type", "lr_scheduler"),
    "optimizer.learning_rate": ("lr",),
    "optimizer.beta1": ("adam_beta1",),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.epsilon": ("adam_epsilon",),
    "lora": ("use_peft", "finetuning_type", "peft_config"),
    "lora.rank": ("lora_r", "lora_rank", "lora.r"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.targets": ("lora_target", "lora_target_modules", "target_modules"),
    "lora.quantize": ("load_in_4bit", "quantization_bit", "quantization_config"),
    "compute.dtype": ("bf16", "fp16", "torch_dtype", "precision"),
    "compute.attention": ("attn_implementation", "flash_attention", "flash_attn"),
    "compute.checkpointing": ("gradient_checkpointing",),
    "compute.compile": ("torch_compile",),
    "compute.offload": ("activation_offloading",),
    "evaluation.sets": ("eval_dataset", "eval_file", "test_datasets"),
    "evaluation.fraction": ("val_size", "val_set_size"),
    "evaluation.every": ("eval_steps",),
    "rollout.max_tokens": ("max_completion_length", "response_length"),
    "rollout.reward": ("reward_funcs", "reward_model", "reward_model_path"),
    "rollout.responses": ("num_generations",),
    "rollout.server": ("vllm_server_base_url", "vllm_server_host"),
    "rollout.passes": ("num_iterations", "num_ppo_epochs"),
    "checkpoint.every": ("save_steps",),
    "checkpoint.keep": ("save_total_limit",),
    "checkpoint.best": ("metric_for_best_model", "load_best_model_at_end"),
}  # fmt: skip
"""What the keys are called in other programs; one name may be that of two."""

NOT_HERE = {
    "rpo_alpha": "The likelihood of the chosen response is no term of a loss here.",
    "scale_rewards": "Here policy.advantages says what a group's advantages are divided by.",
    "use_vllm": "Here rollout.server is the address of a vLLM server; without it this process "
    "draws.",
    "precompute_ref_log_probs": "Here that is always so: leave it out.",
    "reference_free": "Here log-probs are always held against a reference.",
}
"""What other programs have and no key says here."""


def _meant(typed: str) -> list[str]:
    whole = typed.replace("-", "_")
    section, _, name = whole.rpartition(".")
    return [
        key
        for key, names in ELSEWHERE.items()
        if whole in names
        or (name in names and (section not in SECTIONS or keys()[key].section == section))
    ]


def meant(typed: str) -> str | None:
    """The key that other programs have by this name; of one of our sections only a key of it."""
    return next(iter(_meant(typed)), None)


def called_elsewhere(typed: str) -> str:
    """A trailing ' Here that is X: ...' for a name that other programs have, or ''."""
    if (said := NOT_HERE.get(typed.replace("-", "_"))) is not None:
        return f" {said}"
    found = [keys()[name] for name in _meant(typed)]
    if not found:
        return ""
    takes = f" One of: {', '.join(choices)}." if (choices := found[0].choices) else ""
    each = [f"{key.full}: {key.description}" for key in found]
    return f" Here that is {' Or '.join(each)}{takes}"


def unknown_key(typed: str, objective: str, unread: Collection[str] = ()) -> str:
    """What is wrong with a key that is none, and what may have been meant: no option of the loss
    that is among the `unread` keys of this objective."""
    section, _, name = typed.rpartition(".")
    if typed == STAGES:
        return (
            "stages is a list of runs in a run.yaml, or among the keywords of uw.train and "
            "uw.check, and no word of a command: all of them run, and a finished one is left alone."
        )
    if section not in SECTIONS:
        words = [*keys(), *SECTIONS, STAGES, *(key.name for key in keys().values())]
        guess = called_elsewhere(typed) or nearest(typed, words)
        guess = guess or f" The keys are: {', '.join([*_top_level(), *SECTIONS])}."
        return f"{typed} is not a key of a run.{guess}"
    own = [key.name for key in keys().values() if key.section == section and key.full != section]
    thing = f"a key of {section}"
    if section == "loss":
        thing = f'an option of "{objective}"'
        own = [name for name in own if f"{section}.{name}" not in unread]
    guess = called_elsewhere(typed) or nearest(name, own)
    elsewhere = [] if guess else candidates(name)
    if elsewhere:
        guess = f" Did you mean {' or '.join(elsewhere)}?"
    takes = f": {', '.join(own)}" if own else " none"
    return f"{typed} is not {thing}, which takes{takes}.{guess}"


def _top_level() -> list[str]:
    return [key.name for key in keys().values() if not key.section]


def flags() -> list[Flag]:
    """Every leaf as a flag: `--loss.beta`, and `--beta` too since no other key ends in beta."""
    found: list[Flag] = []
    for key in keys().values():
        names = [key.full]
        if key.full == "data.path":
            names.append("data")
        if candidates(key.name) == [key.full] and key.name != key.full:
            names.append(key.name)
        found.append(
            Flag(
                key=key.full,
                section=key.section,
                names=tuple(f"--{name}" for name in names),
                type=key.kind,
                default=key.default,
                description=key.description,
                many=key.many,
                switch=key.kind == WORDS["boolean"],
            )
        )
    return found


def values_from_flags(given: Mapping[str, str | Sequence[str] | None]) -> dict[str, Any]:
    """What flags were given, by key, as values for load_run; None means not given.

    Raises ConfigError where a text in brackets or quotes is not YAML.
    """
    values: dict[str, Any] = {}
    for key, words in given.items():
        if words is None:
            continue
        if isinstance(words, str):
            words = [words]
        parsed = [parse_value(word, f"--{key}") for word in words]
        values[key] = parsed[0] if len(parsed) == 1 else parsed
    return values
