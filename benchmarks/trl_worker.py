"""TRL's side, in TRL's environment: DPOTrainer on pairs that come in the order they are trained in.

Tasks: train (losses, step times, peak memory) and score (token ids and log-probs of every pair
before training, by the trainer's own function for the reference).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers
import trl
from peft import LoraConfig
from torch.utils.data import DataLoader

from protocol import LORA, Spec, work

Emit = Callable[..., None]


class Steps(transformers.TrainerCallback):
    """Says each optimizer step's loss, gradient norm and duration, once it is logged."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.before = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.before = time.perf_counter()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        now = time.perf_counter()
        self.emit(
            "step",
            step=state.global_step,
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            rewards=[logs["rewards/chosen"], logs["rewards/rejected"]],
            seconds=now - self.before,
        )
        self.before = now


def settings_of(spec: Spec) -> dict[str, Any]:
    """DPOConfig's keywords: what both sides share, then the side's own settings over them.

    Left alone, TRL trains in bf16 with gradient checkpointing, 8 pairs at once and the reference
    model computed in every step.
    """
    own = {"per_device_train_batch_size": 8, **spec.settings}
    at_once = min(own["per_device_train_batch_size"], spec.pairs_per_step)
    if spec.pairs_per_step % at_once:
        raise SystemExit(
            f"{spec.pairs_per_step} pairs per step are not a multiple of the {at_once} at once"
        )
    return {
        "output_dir": f"{spec.scratch}/trl",
        "beta": spec.beta,
        "learning_rate": spec.learning_rate,
        "max_steps": spec.steps,
        "gradient_accumulation_steps": spec.pairs_per_step // at_once,
        "bf16": spec.precision == "bfloat16",
        "use_cpu": True,
        "max_length": None,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "seed": spec.seed,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **own,
        "per_device_train_batch_size": at_once,
    }


def make_trainer(spec: Spec, emit: Emit) -> trl.DPOTrainer:
    class Trainer(trl.DPOTrainer):
        """DPOTrainer that says how long its reference pass before training took."""

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            emit("reference", seconds=time.perf_counter() - start)
            return result

    settings = settings_of(spec)
    shown = {k: v for k, v in settings.items() if k != "output_dir"}
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    emit("side", versions=versions, settings=shown, threads=torch.get_num_threads())
    adapter = None
    if spec.lora:
        adapter = LoraConfig(
            r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            lora_dropout=LORA["dropout"],
            target_modules=LORA["targets"],
            task_type="CAUSAL_LM",
        )
    return Trainer(
        model=spec.model,
        args=trl.DPOConfig(**settings),
        train_dataset=datasets.load_dataset("json", data_files=spec.rows, split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained(spec.model),
        callbacks=[Steps(emit)],
        peft_config=adapter,
    )


def score(trainer: trl.DPOTrainer, emit: Emit) -> None:
    rows = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    found: list[tuple[float, float]] = []
    for batch in DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator):
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        found += zip(chosen.tolist(), rejected.tolist(), strict=True)
    for row, (chosen, rejected) in zip(rows, found, strict=True):
        ids = {name: row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")}
        emit("pair", **ids, logp_chosen=chosen, logp_rejected=rejected)


def main(spec: Spec, emit: Emit) -> None:
    if spec.threads:
        torch.set_num_threads(spec.threads)
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    trainer = make_trainer(spec, emit)
    if spec.task == "score":
        score(trainer, emit)
    else:
        trainer.train()


if __name__ == "__main__":
    work(main)
