"""Keys of objectives that learn from answers which they draw themselves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from upweight.config.base import Count, NotNegative, Positive, Section, Text


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
    server: Text | None = Field(
        default=None,
        description="Address of a vLLM server that draws the answers and is given the adapter "
        "(lora), as http://localhost:8000; null: this process draws them.",
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
        description="Nats a token from a round's start at which its update ends, as seen on the "
        "way into a step, which is still taken; null: never.",
    )
