"""What runs would begin with, were they to begin now, to be held against what they began with."""

from __future__ import annotations

from collections.abc import Sequence

from upweight.config import Run, leaf_values
from upweight.models.load import LanguageModel, fingerprint
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.prepare import ended_answers, load_asked, load_policy, prepare
from upweight.recipes.reference import reference_model
from upweight.recipes.rendering import renderer_for
from upweight.recipes.resume import (
    Beginning,
    data_digests,
    digest_of,
    digests_behind,
    reward_digests,
)
from upweight.recipes.start import trained
from upweight.types import Tree

OF_THE_START = (
    *("model", "compute.dtype", "lora.quantize"),
    *("data.template", "data.template_options", "data.date", "data.max_length"),
)
"""Keys that decide which model is started from, and with which tokens it is asked."""


def choice_of(run: Run, model: str, prompts: Sequence[Tree]) -> Beginning:
    """What best of n begins with: the start by its fingerprint, the prompts of evaluations, what
    chooses among the answers to them and what judges these."""
    specs = {
        "rollout.reward": run.rollout.reward,
        "evaluation.true_reward": run.evaluation.true_reward,
    }
    digests = digests_behind(specs, prompts)
    return Beginning(model, model, {PROMPTS: digest_of(prompts)}, digests)


class Beginnings:
    """Keeps the start that was read last: runs beside each other mostly have it in common."""

    def __init__(self) -> None:
        self._key: object = None
        self._start: tuple[LanguageModel, str] | None = None

    def of(self, run: Run) -> Beginning:
        """Reads the run's model, its reference and its rows, and computes nothing with them."""
        if not KINDS[run.objective].answers:
            return self._of_scorer(run)
        lm, model = self._policy(run)
        prepared = prepare(run, lm)
        against = model
        if run.reference not in (None, run.model):
            with reference_model(run, lm) as reference:
                against = fingerprint(reference)
        return Beginning(model, against, data_digests(prepared), reward_digests(run, prepared))

    def of_choice(self, run: Run) -> Beginning:
        """Of best of n, which reads no rows to learn from."""
        lm, model = self._policy(run)
        prompts, _, _ = load_asked(run, renderer_for(run, lm))
        return choice_of(run, model, prompts)

    def _of_scorer(self, run: Run) -> Beginning:
        # Its head takes the place of the policy's, which others start with.
        lm = load_policy(run)
        prepared = ended_answers(prepare(run, lm), lm)
        as_it_is = run.compute.model_copy(update={"compile": False, "checkpointing": False})
        plain = run.model_copy(update={"compute": as_it_is})
        model = fingerprint(trained(plain, lm, prepared.renderer.stop_ids))
        return Beginning(model, model, data_digests(prepared), reward_digests(run, prepared))

    def _policy(self, run: Run) -> tuple[LanguageModel, str]:
        key = [leaf_values(run).get(key) for key in OF_THE_START]
        if self._start is None or key != self._key:
            self._start = None  # before the next is there
            lm = load_policy(run)
            self._key, self._start = key, (lm, fingerprint(lm))
        return self._start
