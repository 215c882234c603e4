"""Best of n: no training, but the answer of several that a reward likes best."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from upweight.config import Run, leaf_values
from upweight.config.methods import BEST_OF_N, Method
from upweight.config.objectives import CHOOSING
from upweight.errors import ConfigError
from upweight.evidence import comparison as scored
from upweight.evidence.records.objects import JsonObject, json_file
from upweight.models.load import fingerprint
from upweight.models.sample import sample
from upweight.recipes.beginnings import choice_of
from upweight.recipes.measured import Measured, told
from upweight.recipes.prepare import load_asked, load_policy
from upweight.recipes.reference import sampled_trees
from upweight.recipes.rendering import renderer_for
from upweight.recipes.resume import FREE_TO_CHANGE, Beginning
from upweight.recipes.rewarding import is_judge, make_scorer
from upweight.stats import mean_interval
from upweight.training.records import finite
from upweight.training.rollout import as_tree
from upweight.training.rundir import require_run_dir, write_atomic


def best_of(method: Method, run: Run) -> Measured:
    """What the best of n earn, as it was kept in the method's folder, or else found and kept."""
    if (kept := _kept(run)) is None:
        assert run.out is not None
        require_run_dir(Path(run.out), False)
        return _drawn(method, run)
    shown = scored.read_method(kept.object("method"))
    return Measured(replace(shown, name=method.name, note=told(method)), began=_began(kept))


def is_chosen(run: Run) -> bool:
    """Whether best of n has finished in the run's folder."""
    return _kept(run) is not None


def choice_began(run: Run) -> Beginning:
    """What the best of n that has finished in the run's folder began with."""
    kept = _kept(run)
    assert kept is not None
    return _began(kept)


def as_chosen(run: Run) -> Run:
    """The run of a best of n that has finished, of the day that its prompts were of where it names
    none."""
    kept = _kept(run)
    assert kept is not None
    day = kept.object("settings").fields["data.date"]
    return run if day is None or run.data.date is not None else _of_day(run, str(day))


def require_chosen_as_asked(method: Method, run: Run) -> None:
    """Raises ConfigError where a best of n that has finished was found with other settings."""
    kept = _kept(run)
    assert kept is not None
    then, now = kept.object("settings").fields, _settings(method, as_chosen(run))
    said = [f"{k} is {now[k]} here and was {then.get(k)}" for k in now if then.get(k) != now[k]]
    if said:
        raise ConfigError(
            f"the run in {run.out} is finished, with other settings ({'; '.join(said)}). Put them "
            f"back, remove {run.out} to have it drawn again, or choose another out."
        )


def _of_day(run: Run, day: str | None) -> Run:
    return run.model_copy(update={"data": run.data.model_copy(update={"date": day})})


def _file(run: Run) -> Path:
    assert run.out is not None
    return Path(run.out) / "chosen.json"


def _kept(run: Run) -> JsonObject | None:
    return json_file(_file(run))


def _keep(method: Method, run: Run, shown: scored.Method, began: Beginning) -> None:
    whole = {
        "settings": _settings(method, run), "began": asdict(began), "method": asdict(shown)
    }  # fmt: skip
    file = _file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(finite(whole), indent=1, allow_nan=False))


def _began(kept: JsonObject) -> Beginning:
    said = kept.object("began")
    digests = [said.object(key) for key in ("data_digests", "reward_digests")]
    return Beginning(
        said.text("model_fingerprint"),
        said.text("reference_fingerprint"),
        *({name: each.text(name) for name in each.fields} for each in digests),
    )


def _settings(method: Method, run: Run) -> dict[str, Any]:
    """What it reads of the run, as JSON has it, and how many answers there are to each prompt."""
    read = {k: v for k, v in leaf_values(run).items() if k in CHOOSING - FREE_TO_CHANGE}
    return {"num": method.num, **json.loads(json.dumps(read))}


def _drawn(method: Method, run: Run) -> Measured:
    """The answer of `num` that the method's reward likes best, for every prompt.

    Its KL to the start is at most log n - (n - 1)/n nats (Beirami et al. 2024, arXiv:2401.01879):
    close to that where no two answers score the same, and far below it where many do, as where
    they are right or wrong. What is kept of it is that bound, above 0.
    """
    lm = load_policy(run)
    renderer = renderer_for(run, lm)
    prompts, _, _ = load_asked(run, renderer)
    began_with = choice_of(run, fingerprint(lm), prompts)
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
    reward = (found.value, found.low, found.high)
    point = scored.Point(method.num, bound, 0.0, bound, *reward, length, len(asked))
    num, drew = len(trees), sum(len(tree.responses) for tree in trees)
    shown = scored.Method(
        method.name,
        BEST_OF_N,
        told(method),
        seconds,
        times_read * sum(tree.num_tokens for tree in trees),
        (point,),
        taught=scored.Taught("prompts", num, num, 0, drew, method.reward),
    )
    _keep(method, _of_day(run, renderer.date), shown, began_with)
    return Measured(shown, began=began_with)
