"""Best of n: no training, but the answer of several that a reward likes best."""

from __future__ import annotations

import math
import time

from upweight.config import Run
from upweight.config.methods import BEST_OF_N, Method
from upweight.evidence import comparison as scored
from upweight.models.load import fingerprint
from upweight.models.sample import sample
from upweight.recipes.alike import JUDGE
from upweight.recipes.kinds import PROMPTS
from upweight.recipes.measured import Measured, told
from upweight.recipes.prepare import load_asked, load_policy
from upweight.recipes.reference import sampled_trees
from upweight.recipes.rendering import renderer_for
from upweight.recipes.resume import Beginning, content_digest, digest_of
from upweight.recipes.rewarding import is_judge, make_scorer
from upweight.stats import mean_interval
from upweight.training.rollout import as_tree


def best_of(method: Method, run: Run) -> Measured:
    """The answer of `num` that the method's reward likes best, for every prompt.

    Its KL to the start is at most log n - (n - 1)/n nats (Beirami et al. 2024, arXiv:2401.01879):
    close to that where no two answers score the same, and far below it where many do, as where
    they are right or wrong. What is kept of it is that bound, above 0.
    """
    lm = load_policy(run)
    renderer = renderer_for(run, lm)
    prompts, _, _ = load_asked(run, renderer)
    asked = sampled_trees(run, prompts)
    assert run.rollout.reward is not None and run.evaluation.true_reward is not None
    choose = make_scorer(run.rollout.reward, run, lm, renderer.end)
    judge = make_scorer(run.evaluation.true_reward, run, lm, renderer.end)
    began = time.monotonic()
    drawn = sample(
        lm,
        [tree.prompt for tree in asked],
        num=method.num,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.seed + 1,
        stop_token_ids=renderer.stop_ids,
    )
    trees = [as_tree(tree, answers) for tree, answers in zip(asked, drawn, strict=True)]
    scores = choose(trees)
    seconds = time.monotonic() - began
    best = [
        as_tree(tree, [answers[max(range(len(each)), key=each.__getitem__)]])
        for tree, answers, each in zip(asked, drawn, scores, strict=True)
    ]
    found = mean_interval([score for (score,) in judge(best)])
    bound = math.log(method.num) - (method.num - 1) / method.num
    times_read = 1 + is_judge(run.rollout.reward)
    length = sum(len(tree.responses[0]) for tree in best) / len(best)
    point = scored.Point(method.num, bound, 0.0, bound, found.value, found.low, found.high, length)
    num, drew = len(trees), sum(len(tree.responses) for tree in trees)
    start, judged = fingerprint(lm), content_digest(run.evaluation.true_reward)
    return Measured(
        scored.Method(
            method.name,
            BEST_OF_N,
            told(method),
            seconds,
            times_read * sum(tree.num_tokens for tree in trees),
            (point,),
            taught=scored.Taught("prompts", num, num, 0, drew, method.reward),
        ),
        began=Beginning(
            start, start, {PROMPTS: digest_of(prompts)}, {} if judged is None else {JUDGE: judged}
        ),
    )
