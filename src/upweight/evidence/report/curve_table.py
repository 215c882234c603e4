"""CURVES: which metrics are drawn together, for which kind of run, and how each chart is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from upweight.evidence.report.charts import Guide
from upweight.evidence.report.findings import Subject


@dataclass(frozen=True, slots=True)
class Line:
    """One metric as a line: the key, what the legend calls it, and its colour class.

    A `smooth` line of many training steps is drawn with its running mean.
    """

    key: str
    name: str
    tone: str
    dashed: bool = False
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Curve:
    """One chart. `train` lines are drawn from the training steps, `evals` once per set.

    `about` are the kinds of run that have it, all of them if it names none; an `optional` one is
    not missed where it was not recorded, a `steered` one not drawn where it never changes.
    `bounds` is the key before _low and _high of the interval that the evaluation lines carry.
    """

    title: str
    unit: str
    reading: str
    train: tuple[Line, ...] = ()
    evals: tuple[Line, ...] = ()
    about: tuple[Subject, ...] = ()
    optional: bool = False
    steered: bool = False
    bounds: str = ""
    guides: tuple[Guide, ...] = ()
    percent: bool = False
    log: bool = False
    include: tuple[float, ...] = ()


def _train(key: str, name: str = "train") -> tuple[Line, ...]:
    return (Line(key, name, "t-train"),)


def _sampled(key: str) -> tuple[Line, ...]:
    return (
        Line(key, "policy", "t-policy"),
        Line(f"reference_{key}", "reference", "t-reference", dashed=True),
    )


_SETS = "training falling while an evaluation set rises is overfitting."

CURVES = (
    Curve(
        "Reward of sampled answers",
        "mean",
        "What the policy's answers to held-out prompts earn, against the reference's to the same "
        "prompts. The band is the 95 % interval.",
        evals=_sampled("reward"),
        about=("answers",),
        bounds="reward",
    ),
    Curve(
        "Reward of rollouts",
        "mean",
        "What the answers earned that each step learned from, by the reward that is trained for.",
        _train("reward", "rollouts"),
        about=("answers",),
    ),
    Curve(
        "Loss",
        "nats per preference",
        f"Lower is better; {_SETS}",
        _train("loss"),
        (Line("loss", "", ""),),
        about=("preferences",),
        guides=(Guide(math.log(2), "ln 2: equal to the reference"),),
    ),
    Curve(
        "Loss",
        "nats per preference",
        f"Lower is better; {_SETS}",
        _train("loss"),
        (Line("loss", "", ""),),
        about=("ranking",),
        guides=(Guide(math.log(2), "ln 2: equal scores"),),
    ),
    Curve(
        "Loss",
        "nats per token",
        f"How unlikely the responses' tokens are to the policy. Lower is better; {_SETS}",
        _train("loss"),
        (Line("loss", "", ""),),
        about=("likelihood",),
    ),
    Curve(
        "Log-prob of responses",
        "nats per response",
        "The sum over a response's tokens: higher is likelier, and longer responses are lower.",
        _train("logps/response"),
        (Line("logps/response", "", ""),),
        about=("likelihood",),
    ),
    Curve(
        "Reward margin",
        "beta × nats",
        "How much more the policy upweighted chosen answers than rejected ones; 0 before training.",
        _train("rewards/margins"),
        (Line("rewards/margins", "", ""),),
        about=("preferences", "answers"),
        optional=True,
        include=(0.0,),
    ),
    Curve(
        "Score margin",
        "nats",
        "How much higher chosen answers score than rejected ones: the model's log-odds that a "
        "chosen answer is preferred.",
        _train("rewards/margins"),
        (Line("rewards/margins", "", ""),),
        about=("ranking",),
        include=(0.0,),
    ),
    Curve(
        "Accuracy",
        "share of preferences",
        "Share of preferences whose chosen answer has the higher reward, a tie counting one half; "
        "the band is its 95 % interval.",
        _train("rewards/accuracies"),
        (Line("rewards/accuracies", "", ""),),
        about=("preferences", "ranking", "answers"),
        optional=True,
        bounds="rewards/accuracies",
        guides=(Guide(0.5, "chance"),),
        percent=True,
        include=(1.0,),
    ),
    Curve(
        "Scores of training answers",
        "mean",
        "Only their difference is learned; their common level is free to drift.",
        (
            Line("rewards/chosen", "chosen", "t-chosen"),
            Line("rewards/rejected", "rejected", "t-rejected", dashed=True),
        ),
        about=("ranking",),
    ),
    Curve(
        "Sampled KL",
        "nats per answer",
        "How far the policy's own answers have moved from the reference; the band is the 95 % "
        "interval. It is an estimate from samples, which can fall below 0 where the KL is small.",
        _train("kl", "rollouts"),
        (Line("kl", "", ""),),
        about=("preferences", "likelihood", "answers"),
        bounds="kl",
        include=(0.0,),
    ),
    Curve(
        "Reward of sampled answers",
        "mean",
        "What the policy's answers earn by evaluation.true_reward, which training did not see, "
        "against the reference's to the same prompts. The band is the 95 % interval.",
        evals=_sampled("reward"),
        about=("preferences", "likelihood"),
        optional=True,
        bounds="reward",
    ),
    Curve(
        "Loss",
        "",
        "Its level says little, for each round begins anew: read reward and KL. The policy's own "
        "part is drawn where the value loss is in it too.",
        (*_train("loss"), Line("policy_loss", "policy", "t-policy", dashed=True)),
        about=("answers",),
    ),
    Curve(
        "Entropy",
        "nats per token",
        "How undecided the policy was about the tokens that it drew, as estimated from them; a "
        "fall to nearly 0 is a policy that has stopped trying anything else.",
        _train("entropy", "rollouts"),
        about=("answers",),
        optional=True,
        include=(0.0,),
    ),
    Curve(
        "Clipped tokens",
        "share of tokens",
        "Tokens that had moved so far since their round was drawn that they were not pushed "
        "further; a lasting share above a fifth means too many passes or too high a rate.",
        _train("clip_fraction"),
        about=("answers",),
        optional=True,
        percent=True,
        include=(0.0,),
    ),
    Curve(
        "Distance within a round",
        "nats per token",
        "How far the policy has moved from the one that drew the answers it learns from (k3 "
        "estimate); it starts at 0 with each round.",
        _train("approx_kl"),
        about=("answers",),
        optional=True,
        include=(0.0,),
    ),
    Curve(
        "Tokens with an advantage",
        "share of tokens",
        "The others teach nothing: all answers to their prompt earned the same.",
        _train("advantages/nonzero"),
        about=("answers",),
        optional=True,
        percent=True,
        include=(0.0, 1.0),
    ),
    Curve(
        "Value loss",
        "reward squared",
        "How well the value model foresees what an answer will earn; lower is better, and it rises "
        "when the policy's answers change quickly.",
        _train("value_loss"),
        about=("answers",),
        optional=True,
        include=(0.0,),
    ),
    Curve(
        "Explained variance",
        "share of the returns' variance",
        "What of an answer's worth the value model foresaw: 1 is all of it, 0 no more than a "
        "constant does, below 0 less.",
        _train("explained_variance", "rollouts"),
        about=("answers",),
        optional=True,
        include=(0.0, 1.0),
    ),
    Curve(
        "Weight of the KL term",
        "beta",
        "As it was steered towards policy.kl_target.",
        _train("beta"),
        about=("answers",),
        optional=True,
        steered=True,
    ),
    Curve(
        "Gradient norm",
        "before clipping",
        "A steady or falling level is healthy; growing spikes mean too high a learning rate.",
        (
            *_train("grad_norm"),
            Line("grad_norm/value", "value model", "t-4", dashed=True),
        ),
        log=True,
    ),
    Curve(
        "Learning rate",
        "",
        "The schedule as it was applied, warmup included.",
        (Line("learning_rate", "train", "t-train", smooth=False),),
        include=(0.0,),
    ),
    Curve(
        "Scored length",
        "tokens per answer",
        "Mean scored tokens of the training answers; a lasting gap means that length itself was "
        "preferred in the data.",
        (
            Line("tokens/chosen", "chosen", "t-chosen"),
            Line("tokens/rejected", "rejected", "t-rejected", dashed=True),
        ),
        about=("preferences", "answers"),
        optional=True,
        include=(0.0,),
    ),
    Curve(
        "Scored length",
        "tokens per response",
        "Mean scored tokens of the responses.",
        _train("tokens/response"),
        (Line("tokens/response", "", ""),),
        about=("likelihood",),
        include=(0.0,),
    ),
    Curve(
        "Sampled length",
        "tokens per answer",
        "Mean length of what the policy says against what the reference says to the same prompts.",
        _train("length", "rollouts"),
        _sampled("length"),
        about=("preferences", "likelihood", "answers"),
        include=(0.0,),
    ),
    Curve(
        "Repetition",
        "share of four tokens in a row",
        "How much of an answer it has said before; far above the reference's is a policy that goes "
        "round in circles. The band is the 95 % interval.",
        _train("repetition", "rollouts"),
        _sampled("repetition"),
        about=("preferences", "likelihood", "answers"),
        bounds="repetition",
        percent=True,
        include=(0.0,),
    ),
    Curve(
        "Answers that end by themselves",
        "share of sampled answers",
        "The others run into evaluation.max_new_tokens (rollouts: rollout.max_tokens); a fall "
        "below the reference's is a stop token that gets lost. The band is the 95 % interval.",
        _train("stopped", "rollouts"),
        _sampled("stopped"),
        about=("preferences", "likelihood", "answers"),
        bounds="stopped",
        percent=True,
        include=(0.0, 1.0),
    ),
    Curve(
        "Prompts without a lesson",
        "share of prompts",
        "All answers to the prompt earned the same reward, which tells none of them apart.",
        _train("tied", "rollouts"),
        about=("answers",),
        optional=True,
        percent=True,
        include=(0.0,),
    ),
    Curve(
        "Throughput",
        "tokens per second",
        "Speed of the training steps; a fall means something else took the machine.",
        _train("tokens_per_second"),
        include=(0.0,),
    ),
)
