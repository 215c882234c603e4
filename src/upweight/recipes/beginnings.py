"""What runs would begin with, were they to begin now, to be held against what they began with."""

from __future__ import annotations

from upweight.config import Run, leaf_values
from upweight.models.load import LanguageModel, fingerprint
from upweight.recipes.kinds import KINDS
from upweight.recipes.prepare import ended_answers, load_policy, prepare
from upweight.recipes.reference import reference_model
from upweight.recipes.resume import Beginning, data_digests, reward_digests
from upweight.recipes.start import trained

OF_THE_START = (
    *("model", "compute.dtype", "lora.quantize"),
    *("data.template", "data.template_options", "data.max_length"),
)
"""Keys that decide which model is started from, and with which tokens it is asked."""


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
