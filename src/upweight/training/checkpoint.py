"""Checkpoints: all that training needs to go on as if it had never stopped, without pickle.

checkpoints/step-00000120/
  weights.safetensors     trainable parameters by name; a tied parameter once
  optimizer.safetensors   "slot/parameter name": exp_avg, exp_avg_sq, step
  random.safetensors      torch's generators, as bytes
  state.json              position, and the generators of Python and numpy
  manifest.json           size and sha256 of the files above, written last

A checkpoint is written under a temporary name and renamed when all of it is on the disk, so that
a kill at any moment leaves it whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from upweight.errors import ModelError, OutputError, some_of
from upweight.training.moment import Position, RandomState, TrainState
from upweight.training.rundir import (
    CHECKPOINT,
    REPLACED,
    TEMPORARY,
    remove,
    require_space,
    sync,
    temporary_name,
    writing,
)

FORMAT = 4
_DAMAGED = "damaged-"
_MEANS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(rf"(?:{re.escape(CHECKPOINT)}|{re.escape(REPLACED)})(\d{{8,}})")
_logger = logging.getLogger(__name__)


def capture(model: nn.Module, optimizer: Optimizer, position: Position) -> TrainState:
    """The state as it is, to be saved before the next update.

    The tensors are the model's and the optimizer's own memory, not copies: a copy of weights and
    moments at every checkpoint would be the largest allocation of a run.
    """
    trainable = _trainable(model)
    names = {parameter: name for name, parameter in trainable.items()}
    return TrainState(
        position=position,
        weights={name: parameter.detach() for name, parameter in trainable.items()},
        moments={
            names[parameter]: {slot: _as_tensor(value) for slot, value in slots.items()}
            for parameter, slots in optimizer.state.items()
        },
        random=_capture_random(),
    )


def _as_tensor(value: Any) -> Tensor:
    """A slot as safetensors has it. bitsandbytes counts its steps in integers, and all its
    parameters share one small table of the 256 numbers, which a file holds once for each."""
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    return value.detach().clone() if value.numel() == 256 else value.detach()


def restore(model: nn.Module, optimizer: Optimizer, state: TrainState) -> None:
    """Makes weights, optimizer state and random generators bit for bit those of `state`.

    The optimizer keeps its own settings (rates, decay), which are the configuration's. Raises
    ModelError, before anything is changed, when the model's trainable parameters are not those of
    the checkpoint by name, shape and dtype.
    """
    trainable = _trainable(model)
    _require_fit(trainable, state)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(state.weights[name])
    names = {parameter: name for name, parameter in trainable.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    packed = optimizer.state_dict()
    # Cloned: the optimizer takes tensors that need no conversion as they are, and updates them.
    packed["state"] = {
        i: {
            slot: int(value) if value.dtype == torch.int64 else value.clone()
            for slot, value in state.moments[names[p]].items()
        }
        for i, p in enumerate(parameters)
        if names[p] in state.moments
    }
    optimizer.load_state_dict(packed)
    _restore_random(state.random)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _require_fit(trainable: Mapping[str, Tensor], state: TrainState) -> None:
    found: list[str] = []
    if missing := trainable.keys() - state.weights.keys():
        found.append(f"the checkpoint lacks {some_of(sorted(missing), 3)}")
    if unknown := (state.weights.keys() | state.moments.keys()) - trainable.keys():
        found.append(f"the model does not train {some_of(sorted(unknown), 3)}")
    if not found:
        differing = {
            f"{name} ({_form(saved)} in the checkpoint, {_form(trainable[name])} in the model)"
            for name, saved in _shaped(state)
            if _form(saved) != _form(trainable[name])
        }
        if differing:
            found.append(f"these differ: {some_of(sorted(differing), 3)}")
    if found:
        raise ModelError(
            f"the checkpoint of step {state.position.step} is not this model's: "
            f"{'; '.join(found)}. Resume with the model, lora and compute settings that the run "
            "began with; its run.yaml has them."
        )


def _shaped(state: TrainState) -> Iterable[tuple[str, Tensor]]:
    yield from state.weights.items()
    for name, slots in state.moments.items():
        # The others' shapes are not the parameter's: a step, the scales of 8-bit blocks.
        yield from ((name, value) for slot, value in slots.items() if slot in _MEANS)


def _form(tensor: Tensor) -> str:
    sizes = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{sizes} {str(tensor.dtype).removeprefix('torch.')}"


def _capture_random() -> RandomState:
    # Asking a GPU that is not in use would take memory on it.
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    numpy = dict(np.random.get_state(legacy=False))
    numpy["state"] = {k: np.asarray(v).tolist() for k, v in numpy["state"].items()}
    return RandomState(torch.get_rng_state(), cuda, random.getstate(), numpy)


def _restore_random(state: RandomState) -> None:
    version, words, gauss = state.python
    random.setstate((version, tuple(words), gauss))
    # A list of Python integers would be taken for signed ones.
    key = np.array(state.numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state.numpy, "state": {**state.numpy["state"], "key": key}})
    torch.set_rng_state(state.torch)
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.cuda)
    elif state.cuda is not None or torch.cuda.is_initialized():
        _logger.warning(
            "the checkpoint was made %s a GPU and this run is not: what is drawn at random, as in "
            "dropout, will differ from the uninterrupted run.",
            "without" if state.cuda is None else "on",
        )


def save(folder: Path, state: TrainState) -> Path:
    """Writes folder/step-00000120, whole and on the disk when this returns, or not at all.

    A checkpoint of the same step is replaced. Raises OutputError when there is no room for it or
    the folder cannot be written.
    """
    name = f"{CHECKPOINT}{state.position.step:08d}"
    final = folder / name
    temporary = temporary_name(final)
    with writing(final, state.num_bytes):
        folder.mkdir(parents=True, exist_ok=True)
        require_space(final, state.num_bytes)
        temporary.mkdir()
        try:
            _write(temporary, state)
            _publish(temporary, final)
        except BaseException:
            remove(temporary)
            raise
    return final


def _write(folder: Path, state: TrainState) -> None:
    moments = {
        f"{slot}/{name}": value
        for name, slots in state.moments.items()
        for slot, value in slots.items()
    }
    generators = {"torch": state.random.torch}
    if state.random.cuda is not None:
        generators["cuda"] = state.random.cuda
    _save_tensors(folder / "weights.safetensors", state.weights)
    _save_tensors(folder / "optimizer.safetensors", moments)
    _save_tensors(folder / "random.safetensors", generators)
    plain = {
        "position": asdict(state.position),
        "random": {"python": state.random.python, "numpy": state.random.numpy},
    }
    (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": state.position.step, "files": files}
    for name in files:
        sync(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # It tells an operating system's refusal in words only.
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), str(error), str(path)) from error
        raise


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _publish(temporary: Path, final: Path) -> None:
    # A folder cannot be renamed onto another that has files. `latest` reads the replaced one
    # while neither has the final name.
    replaced = _replaced(final)
    if final.exists():
        remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    remove(replaced)


def _replaced(final: Path) -> Path:
    return final.with_name(REPLACED + final.name.removeprefix(CHECKPOINT))


def load(folder: Path, *, verified: bool = False) -> TrainState:
    """Reads a checkpoint onto the CPU. Its tensors are the files' pages, read when used.

    Raises OutputError when it is damaged; `verified` says that `latest` or `recover` has just
    looked.
    """
    if not verified and (damage := _damage(folder)):
        raise OutputError(f"the checkpoint {folder} is damaged: {damage}. Resume from another one.")
    plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        slot, _, name = key.partition("/")
        moments.setdefault(name, {})[slot] = value
    generators = load_file(folder / "random.safetensors")
    return TrainState(
        position=Position(**plain["position"]),
        weights=load_file(folder / "weights.safetensors"),
        moments=moments,
        random=RandomState(
            torch=generators["torch"],
            cuda=generators.get("cuda"),
            python=plain["random"]["python"],
            numpy=plain["random"]["numpy"],
        ),
    )


def positions(folder: Path) -> list[Position]:
    """Where each checkpoint in `folder` is, by its own word."""
    files = [path / "state.json" for path in _by_step(folder).values()]
    return [
        Position(**json.loads(file.read_text(encoding="utf-8"))["position"])
        for file in files
        if file.is_file()
    ]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is whole, or None. Every byte of it is checked.

    A damaged newer one is named in a logged warning. Changes nothing.
    """
    return _newest(folder)[0]


def recover(folder: Path) -> Path | None:
    """What a run does before anything else: removes what a kill left unfinished; as `latest`.

    Damaged checkpoints newer than the one returned are renamed to damaged-step-..., so that
    `prune` cannot keep one in place of a good one.
    """
    if not folder.is_dir():
        return None
    with writing(folder):
        for step_folder in _by_step(folder).values():
            final = step_folder.with_name(CHECKPOINT + _digits(step_folder))
            if step_folder != final:
                step_folder.rename(final)
        for entry in list(folder.iterdir()):
            if entry.name.startswith((TEMPORARY, REPLACED)):
                remove(entry)
        newest, damaged = _newest(folder)
        for path in damaged:
            aside = path.with_name(_DAMAGED + path.name)
            remove(aside)
            path.rename(aside)
        sync(folder)
    return newest


def prune(folder: Path, keep: int, best: Path | None) -> None:
    """Removes all checkpoints but the newest `keep` and `best`. For use after `save`.

    Each leaves its final name before its files go, so that a kill leaves none of them halved.
    """
    assert keep >= 1, f"at least one checkpoint is kept, not {keep}"
    with writing(folder):
        found = _by_step(folder)
        for step in sorted(found, reverse=True)[keep:]:
            if best is None or found[step].name != best.name:
                temporary = temporary_name(found[step])
                found[step].rename(temporary)
                remove(temporary)


def _by_step(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    # Sorted, a replaced checkpoint comes before the one that replaces it, which then stands.
    named = [path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name)]
    return {int(_digits(path)): path for path in named if path.is_dir()}


def _digits(path: Path) -> str:
    found = _NAME.fullmatch(path.name)
    assert found is not None, f"{path} is not named as a checkpoint is"
    return found[1]


def _newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the damaged ones that are newer."""
    damaged: list[Path] = []
    found = _by_step(folder)
    for step in sorted(found, reverse=True):
        damage = _damage(found[step])
        if damage is None:
            return found[step], damaged
        _logger.warning("the checkpoint %s is damaged and is not used: %s.", found[step], damage)
        damaged.append(found[step])
    return None, damaged


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        form, step, files = manifest["format"], manifest["step"], manifest["files"]
    except OSError as error:
        return f"manifest.json cannot be read ({os.strerror(error.errno or 0)})"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not a checkpoint's manifest"
    if form != FORMAT:
        raise OutputError(
            f"{folder} is a checkpoint of format {form} and this version of upweight reads format "
            f"{FORMAT}. Resume with the version that wrote it: environment.json names it."
        )
    if step != int(_digits(folder)):
        return f"it is named {folder.name} and holds step {step}"
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes of {expected['bytes']}"
            if _describe(folder / name) != expected:
                return f"{name} is not what was written (its sha256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({os.strerror(error.errno or 0)})"
    return None
