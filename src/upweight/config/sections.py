"""The keys of a run, their ranges and defaults: inert, frozen, and without torch.

Types are strict: true is not the number 1, and 1.5 is not the whole number 1. Text in, text out:
what a quoted or unquoted value of run.yaml means is settled in written.py before it comes here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from upweight.config.base import (
    Count,
    Day,
    NotNegative,
    Positive,
    Section,
    Share,
    Text,
    Texts,
    Tracker,
    Trackers,
)
from upweight.config.limits import Preflight, Watch
from upweight.config.rounds import Policy, Rollout


class Data(Section):
    """the preferences, and how rows become tokens"""

    path: Texts = Field(description="Files of preferences: JSON, JSONL, Parquet or CSV.")
    format: Literal["auto", "pair", "responses", "messages", "completion"] = Field(
        default="auto", description="Layout of the rows; auto reads it off their columns."
    )
    template: Literal["auto", "chat", "none"] = Field(
        default="auto",
        description="Render text with the chat template; auto: where the tokenizer has one.",
    )
    template_options: dict[Text, JsonValue] = Field(
        default_factory=dict[str, JsonValue],
        description="Extra variables for the chat template, such as enable_thinking.",
    )
    date: Day | None = Field(
        default=None,
        description="The day that a chat template which writes the date is told; null: that of the "
        "model's own training, or of the run's start.",
    )
    max_length: Count | None = Field(
        default=None,
        description="Most tokens of prompt and response together; null: the model's limit.",
    )
    truncation: Literal["drop", "prompt", "response"] = Field(
        default="drop", description="What gives way when a row is longer than max_length."
    )
    pairing: Literal["auto", "adjacent", "all", "extremes"] = Field(
        default="auto",
        description="Which preferences are made among K scored responses; auto: those that a row "
        "states, or else all that its scores make; any other passes over what is stated.",
    )
    min_score_gap: NotNegative = Field(
        default=0.0, description="Scores that differ by this much or less make no preference."
    )
    limit: Count | None = Field(
        default=None,
        description="Use only the first so many rows; null: all (evaluation sets stay whole).",
    )
    learn: Literal["chosen", "all"] = Field(
        default="chosen",
        description="Which responses of rows with preferences are learned from (sft).",
    )
    turns: Literal["last", "all"] = Field(
        default="last",
        description="Which of the assistant's turns are responses: the last one, or each (sft).",
    )


class Loss(Section):
    """options of the objective"""

    beta: NotNegative = Field(
        default=0.1, description="Strength of the pull to the reference, per nat of log-ratio."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="Probability that a preference is flipped (conservative DPO)."
    )
    margin: NotNegative = Field(
        default=0.0,
        description="How much of a row's margin, or of the gap of its scores, the scores of chosen "
        "and rejected are to differ by (reward).",
    )
    centering: NotNegative = Field(
        default=0.0, description="Weight of the squared sum of a pair's scores (reward)."
    )


class Batch(Section):
    """how much is computed at once"""

    pairs_per_step: Count = Field(default=64, description="Preferences per optimizer step.")
    tokens_per_bin: Count | None = Field(
        default=None,
        description="Tokens per forward pass, which bound memory and change no result; null: what "
        "memory allows, up to where more is no faster (2,048 on a CPU).",
    )


class Optimizer(Section):
    """AdamW and its schedule"""

    learning_rate: Positive | None = Field(
        default=None,
        description="Peak learning rate; null: by the objective, such as 5e-7 for dpo and 1e-5 for "
        "sft, and ten or twenty times that for LoRA.",
    )
    weight_decay: NotNegative = Field(default=0.0, description="Decoupled weight decay.")
    beta1: Share = Field(default=0.9, description="Decay of AdamW's mean of gradients.")
    beta2: Share = Field(default=0.999, description="Decay of AdamW's mean of squared gradients.")
    epsilon: Positive = Field(default=1e-8, description="AdamW's guard against division by zero.")
    moments: Literal["float32", "8bit"] = Field(
        default="float32",
        description="What AdamW keeps its two means in; 8bit takes a quarter of the memory, rounds "
        "them, is slow on a CPU, and needs bitsandbytes.",
    )
    max_grad_norm: Positive | None = Field(
        default=1.0, description="Norm that gradients are clipped to; null: no clipping."
    )
    warmup: Share = Field(default=0.1, description="Share of the steps over which the rate rises.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warmup."
    )


def _twice_the_rank(validated: dict[str, Any]) -> float:
    return 2.0 * validated.get("rank", 16)


class Lora(Section):
    """low-rank adapters; null trains all weights"""

    rank: Count = Field(default=16, description="Rank of every adapter.")
    alpha: Positive = Field(
        default_factory=_twice_the_rank,
        description="Adapters are scaled by alpha / rank; left out, alpha is twice the rank.",
    )
    dropout: Share = Field(default=0.0, description="Dropout on what enters the adapters.")
    targets: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        default="all-linear", description="Names of the modules that get an adapter."
    )
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="What the frozen layers are kept in; nf4 (QLoRA) takes an eighth of fp32's "
        "memory, rounds policy and reference alike, and needs bitsandbytes; null: as they are.",
    )


class Compute(Section):
    """hardware and arithmetic"""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Arithmetic of the forward pass; master weights stay float32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs."
    )
    attention: Literal["auto", "dense", "tiles", "varlen", "flex"] = Field(
        default="auto", description="How forest attention is computed; changes speed and no result."
    )
    sharing: bool = Field(
        default=True,
        description="Compute a prompt once for all of its responses where that is exact.",
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads; null: torch's own choice."
    )
    checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    compile: bool | None = Field(
        default=None,
        description="Decoder layers through torch.compile; null: on a CPU, without lora, where the "
        "run is long enough to pay for it.",
    )
    offload: bool = Field(
        default=False,
        description="Keep activations in host memory until the backward pass (CUDA): saves the "
        "device's memory, and copies take time.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model."
    )


class Evaluation(Section):
    """what is measured on held-out preferences"""

    sets: dict[Text, Texts] = Field(
        default_factory=dict[str, list[str]],
        description="Named evaluation sets: a name and its file or files.",
    )
    fraction: Share = Field(
        default=0.0,
        description='Share of the prompts held out of training as the set "heldout", each drawn by '
        "itself: of few it may be more or fewer.",
    )
    prompt_files: Texts | None = Field(
        default=None,
        description="Files of prompts that are answered at each evaluation; null: those of the "
        "sets.",
    )
    every: Count | None = Field(
        default=None, description="Steps between evaluations; null: about ten in a run."
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        default=8,
        description="Prompts that policy and reference answer at each evaluation; of fewer than 6 "
        "nothing is known of the spread, and UW305 and UW308 cannot be asked.",
    )
    max_new_tokens: Count = Field(default=64, description="Longest sampled answer, in tokens.")
    temperature: NotNegative = Field(
        default=1.0, description="Sampling temperature; 0: the likeliest token."
    )
    true_reward: Text | None = Field(
        default=None,
        description="What scores the sampled answers, as rollout.reward; null: nothing, or "
        "rollout.reward.",
    )


class Checkpoint(Section):
    """what is kept to resume from"""

    every: Count | None = Field(
        default=None, description="Steps between checkpoints; null: chosen by the recipe."
    )
    keep: Count = Field(default=2, description="How many of the latest checkpoints are kept.")
    best: Text | None = Field(
        default=None, description="Evaluation metric whose best checkpoint is kept too; null: none."
    )


class Export(Section):
    """the model that is written at the end"""

    merge: bool = Field(
        default=False, description="Merge a LoRA adapter into the weights it adapts."
    )


class Run(Section):
    """Everything one run is told, complete: each default is filled in, each value is in range."""

    model: Text = Field(description="The model to align: a hub id, a folder or a .gguf file.")
    reference: Text | None = Field(
        default=None, description="The reference model; null: the model itself as it starts."
    )
    out: Text | None = Field(
        default=None,
        description="Where results go: a run's folder for train, else a file.",
    )
    objective: Literal["dpo", "sft", "reward", "ppo", "grpo", "rloo", "online_dpo"] = Field(
        default="dpo", description="What is optimized."
    )
    epochs: Positive = Field(default=1.0, le=1e6, description="Passes over the preferences.")
    steps: Count | None = Field(
        default=None, description="Optimizer steps, in place of epochs; null: epochs decides."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        default=0, description="Seed of everything random."
    )
    resume: bool = Field(default=False, description="Go on from the last checkpoint in out.")
    track: Trackers = Field(
        default_factory=list[Tracker], description="Trackers that also get the metrics."
    )
    log_every: Count = Field(default=1, description="Steps between logged lines of metrics.")
    data: Data
    loss: Loss = Loss()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    compute: Compute = Compute()
    rollout: Rollout = Rollout()
    policy: Policy = Policy()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    export: Export = Export()
    preflight: Preflight = Preflight()
    watch: Watch = Watch()


SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "loss": Loss,
    "batch": Batch,
    "optimizer": Optimizer,
    "lora": Lora,
    "compute": Compute,
    "rollout": Rollout,
    "policy": Policy,
    "evaluation": Evaluation,
    "checkpoint": Checkpoint,
    "export": Export,
    "preflight": Preflight,
    "watch": Watch,
}
