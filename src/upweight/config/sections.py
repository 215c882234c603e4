"""The keys of a run, their ranges and defaults: inert, frozen, and without torch.

Types are strict: true is not the number 1, and 1.5 is not the whole number 1. Text in, text out:
what a quoted or unquoted value of run.yaml means is settled in written.py before it comes here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_nul(value: str) -> str:
    # No file name can hold it, and what is opened by such a name fails late and in other words.
    if "\0" in value:
        raise ValueError("a NUL character")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Texts = Annotated[list[Text], BeforeValidator(_listed), Field(min_length=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Trackers = Annotated[list[Tracker], BeforeValidator(_listed)]


class Section(BaseModel):
    """Keys that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    """the preferences, and how rows become tokens"""

    path: Texts = Field(description="Files of preferences: JSON, JSONL, Parquet or CSV.")
    format: Literal["auto", "pair", "responses", "messages"] = Field(
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
    max_length: Count | None = Field(
        default=None,
        description="Most tokens of prompt and response together; null: the model's limit.",
    )
    truncation: Literal["drop", "prompt", "response"] = Field(
        default="drop", description="What gives way when a row is longer than max_length."
    )
    pairing: Literal["adjacent", "all", "extremes"] = Field(
        default="all", description="Which preferences are made among K scored responses."
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
        default=0.0, description='Share of the prompts held out of training as the set "heldout".'
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
        default=4, description="Prompts that policy and reference answer at each evaluation."
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


class Rollout(Section):
    """answers drawn in training (ppo, grpo, rloo, online_dpo)"""

    reward: Text | None = Field(
        default=None,
        description="What scores an answer: number, contains or vader; FILE.py:FUNCTION; an "
        "http:// address; or the folder of a reward model.",
    )
    prompts_per_round: Count = Field(
        default=16, description="Prompts that are answered in a round."
    )
    responses: Count | None = Field(
        default=None,
        description="Answers to each prompt; null: 1 for ppo, 2 for online_dpo, 4 for rloo, 8 for "
        "grpo.",
    )
    max_tokens: Count = Field(default=64, description="Longest answer in training, in tokens.")
    stop_penalty: NotNegative = Field(
        default=0.0, description="Taken from the reward of an answer that does not stop by itself."
    )
    passes: Count | None = Field(
        default=None, description="Passes over a round's answers; null: 4 for ppo, else 1."
    )
    minibatches: Count = Field(default=1, description="Optimizer steps in each pass.")
    renew_reference: Count | None = Field(
        default=None,
        description="Rounds after which the policy becomes the reference; null: it stays.",
    )


class Policy(Section):
    """the policy gradient (ppo, grpo, rloo)"""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="How far below 1 a token's probability ratio is rewarded."
    )
    clip_high: Positive = Field(
        default=0.2, description="How far above 1; 0.28 is DAPO's clip-higher."
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = Field(
        default=None,
        description="Estimator of the KL to the reference, which loss.beta weighs; null: k1, which "
        "is taken from the reward, where k2 and k3 stand in the loss (for ppo in the reward too).",
    )
    advantages: Literal["grpo", "dr_grpo", "rloo"] | None = Field(
        default=None, description="Baseline within a prompt's group; null: the objective's own."
    )
    aggregation: Literal["token", "response", "constant"] | None = Field(
        default=None,
        description="What a step's loss is a mean over; null: response for grpo, else token.",
    )
    value: Literal["shared", "own"] = Field(
        default="own", description="Whether the value head reads the policy's trunk (ppo)."
    )
    value_coefficient: NotNegative = Field(
        default=0.1, description="Weight of the value loss, where the trunk is shared (ppo)."
    )
    value_clip: Positive | None = Field(
        default=0.2, description="How far a value moves in a round's update; null: freely (ppo)."
    )
    value_learning_rate: Positive | None = Field(
        default=None, description="Learning rate of the value model; null: ten times the policy's."
    )
    discount: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Weight of the next token's reward: gamma (ppo)."
    )
    trace: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.95, description="Lambda of generalized advantage estimation (ppo)."
    )
    whiten: bool = Field(default=True, description="Advantages of a round to mean 0, variance 1.")
    kl_target: Positive | None = Field(
        default=None,
        description="Nats an answer that loss.beta is adapted to hold (Ziegler 2019); null: fixed.",
    )
    kl_stop: Positive | None = Field(
        default=None,
        description="Nats a token from a round's start at which its update ends; null: never.",
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


class Preflight(Section):
    """from when on the rows are reported or refused, before step 1"""

    cut: Share = Field(
        default=0.2,
        description="Responses of either side, or prompts, that are cut, or rows and responses "
        "too long, as a share: more is refused (UW205).",
    )
    swapped: Share = Field(
        default=0.25,
        description="Preferences in which the reference agrees, as a share: fewer may be swapped "
        "(UW207).",
    )
    identical: Share = Field(
        default=0.01,
        description="Rows dropped because chosen and rejected are the same, as a share (UW206).",
    )
    contradictory: Share = Field(
        default=0.01, description="Preferences that contradict each other, as a share (UW210)."
    )
    repeated: Share = Field(
        default=0.05,
        description="Rows that repeat an earlier one, or nearly, as a share (UW210).",
    )
    spans: Share = Field(
        default=0.2,
        description="Rows whose tokens do not come apart into prompt, response and one stop, as a "
        "share: more is refused (UW201 to UW204).",
    )
    similar: Share = Field(
        default=0.1,
        description="Preferences whose responses are nearly the same, as a share (UW210).",
    )
    edits: Share = Field(
        default=0.05,
        description="Tokens that differ between responses that are nearly the same, as a share.",
    )
    shortcut: Share = Field(
        default=0.8, description="Accuracy of length alone, or of words alone, as a share (UW211)."
    )
    improbable: NotNegative = Field(
        default=2.0,
        description="Nats a token by which the data may lie below the reference's own answers "
        "(UW212).",
    )


class Watch(Section):
    """from when on what happens during training is reported"""

    moved: Share = Field(
        default=0.5,
        description="Weights in half precision that the first step moves, as a share: fewer are "
        "reported (UW104).",
    )
    displaced: NotNegative = Field(
        default=1.0, description="Nats a token that chosen responses may lose (UW304)."
    )
    length: Annotated[float, Field(ge=1)] = Field(
        default=3.0,
        description="How many times the reference's an answer's length may be, or its inverse "
        "(UW305).",
    )
    repetition: Share = Field(
        default=0.2,
        description="Four tokens in a row that an answer has had before, as a share: so much more "
        "of them than in the reference's answers (UW305).",
    )
    stopped: Share = Field(
        default=0.5,
        description="Answers that end by themselves, as a share of the reference's that do: fewer "
        "are reported (UW305).",
    )
    solved: Share = Field(
        default=0.995,
        description="Training pairs told apart, as a share, at a loss of next to nothing (UW306).",
    )
    easy: Share = Field(
        default=0.97, description="Held-out pairs surely told apart, as a share (UW306)."
    )
    spread: Positive = Field(
        default=10.0,
        description="Mean size of beta times the margin of pairs not trained on yet (UW307).",
    )
    flat: NotNegative = Field(
        default=0.01,
        description="Mean size of beta times the margin at the end; less is reported (UW307).",
    )
    kl: NotNegative = Field(
        default=50.0, description="Nats an answer from the reference, sampled (UW308)."
    )
    suspect: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        default=0.8,
        description="How sure policy and words must be, each, that a label is wrong, before it is "
        "in suspects.jsonl.",
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
