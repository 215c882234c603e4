from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tiny import tiny_model
from upweight.errors import ModelError, OutputError
from upweight.training.checkpoint import (
    capture,
    latest,
    load,
    prune,
    recover,
    restore,
    save,
)
from upweight.training.moment import Position, TrainState
from upweight.training.optimizer import make_optimizer


def position(step: int) -> Position:
    return Position(
        step=step,
        epoch=step / 8,
        num_tokens=1000 * step,
        order_seed=7,
        reference_fingerprint="reference",
        config_digest="config",
        best=0.1 + 0.2,
        best_step=step,
        seconds=1.5,
        model_fingerprint="model",
        data_digests={"train": "rows"},
        window={"sums": {"loss": [0.1, 1.0]}, "num_tokens": 3, "num_pairs": 1, "seconds": 0.5},
    )


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return make_optimizer(
        model, learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8
    )


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One update on tokens that the global generator draws."""
    tokens = torch.randint(0, 256, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def lora(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    with warnings.catch_warnings():
        # peft asks transformers a question that transformers wants asked by another name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(tiny_model("llama"), config).train()


MODELS = {
    "whole": lambda seed: tiny_model("llama", seed),
    "tied": lambda seed: tiny_model("gpt2", seed),
    "bfloat16": lambda seed: tiny_model("qwen3", seed, torch.bfloat16),
    "adapter": lora,
}


def draws() -> list[float]:
    # An odd number of normal draws: the generators keep the other half of a pair.
    python = [random.gauss(0, 1), random.random()]
    numpy = [float(np.random.standard_normal()), float(np.random.rand())]
    return [*python, *numpy, torch.randn(()).item(), torch.rand(()).item()]


def assert_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_restored_run_goes_on_bit_for_bit_as_the_uninterrupted_one(
    kind: str, tmp_path: Path
) -> None:
    model = MODELS[kind](0)
    optimizer = optimizer_of(model)
    draws()
    for _ in range(3):
        update(model, optimizer)
    path = save(tmp_path, capture(model, optimizer, position(3)))
    for _ in range(2):
        update(model, optimizer)
    expected, expected_draws = capture(model, optimizer, position(5)), draws()

    other = MODELS[kind](1)
    if kind == "adapter":  # the frozen base comes from the model's own files
        base = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        other.load_state_dict(base, strict=False)
    other_optimizer = optimizer_of(other)
    update(other, other_optimizer)
    restore(other, other_optimizer, load(path))
    for _ in range(2):
        update(other, other_optimizer)
    got = capture(other, other_optimizer, position(5))
    assert_equal_tensors(dict(got.weights), dict(expected.weights))
    assert got.moments.keys() == expected.moments.keys() == expected.weights.keys()
    for name, slots in got.moments.items():
        assert_equal_tensors(dict(slots), dict(expected.moments[name]))
    assert draws() == expected_draws


def test_a_checkpoint_gives_back_its_position_and_generators(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    state = capture(model, optimizer_of(model), position(4))
    loaded = load(save(tmp_path, state))
    assert loaded.position == state.position
    assert loaded.moments == {}  # before the first update
    assert loaded.random.python == json.loads(json.dumps(state.random.python))
    assert loaded.random.numpy == state.random.numpy
    assert torch.equal(loaded.random.torch, torch.get_rng_state())


def test_restoring_a_state_leaves_it_usable_again() -> None:
    model = tiny_model("llama")
    optimizer = optimizer_of(model)
    update(model, optimizer)
    held = capture(model, optimizer, position(1))
    weights = {n: t.clone() for n, t in held.weights.items()}
    moments = {n: {s: t.clone() for s, t in slots.items()} for n, slots in held.moments.items()}
    kept = replace(held, weights=weights, moments=moments)
    runs: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        restore(model, optimizer, kept)
        update(model, optimizer)
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert_equal_tensors(*runs)


def test_an_adapter_alone_is_stored_and_a_tied_parameter_once(tmp_path: Path) -> None:
    for kind in ("adapter", "tied"):
        model = MODELS[kind](0)
        optimizer = optimizer_of(model)
        update(model, optimizer)
        loaded = load(save(tmp_path / kind, capture(model, optimizer, position(1))))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert loaded.weights.keys() == loaded.moments.keys() == trainable
        assert all(("lora_" in name) == (kind == "adapter") for name in loaded.weights)
        assert "lm_head.weight" not in loaded.weights
        slots = {"exp_avg", "exp_avg_sq", "step"}
        assert all(held.keys() == slots for held in loaded.moments.values())


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_state(120))
    assert path.name == "step-00000120"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000120"]


def test_parameters_are_matched_by_name_and_not_by_order(tmp_path: Path) -> None:
    def build(names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    model, other = build("ab"), build("ba")
    optimizer, other_optimizer = optimizer_of(model), optimizer_of(other)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        for p in m.parameters():
            p.grad = torch.randn_like(p)
        o.step()
    restore(other, other_optimizer, load(save(tmp_path, capture(model, optimizer, position(1)))))
    assert_equal_tensors(dict(model.state_dict()), dict(other.state_dict()))
    for name, p in model.named_parameters():
        q = other.get_parameter(name)
        assert torch.equal(optimizer.state[p]["exp_avg"], other_optimizer.state[q]["exp_avg"])


def test_the_optimizer_keeps_its_own_settings(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = save(tmp_path, capture(model, optimizer_of(model), position(1)))
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    restore(model, optimizer, load(path))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


MISFITS = {
    r"the checkpoint lacks b; the model does not train bias\.": (
        {"weight": (2, 3), "bias": (2,)},
        {"weight": (2, 3), "b": (2,)},
    ),
    r"the checkpoint lacks b, c, d and 1 more\. Resume with the model, lora and compute": (
        {"a": (1,)},
        {name: (1,) for name in "abcde"},
    ),
    r"these differ: w \(2x3 float32 in the checkpoint, 3x2 float32 in the model\)": (
        {"w": (2, 3)},
        {"w": (3, 2)},
    ),
}


def of_shapes(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    return nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("said", MISFITS)
def test_another_models_checkpoint_is_refused_by_name_before_anything_changes(said: str) -> None:
    saved, built = map(of_shapes, MISFITS[said])
    with torch.no_grad():
        for p in saved.parameters():
            p.fill_(1)
    state = capture(saved, optimizer_of(saved), position(6))
    with pytest.raises(ModelError, match=rf"step 6 is not this model's: .*{said}"):
        restore(built, optimizer_of(built), state)
    assert all((p == 0).all() for p in built.parameters())


def test_a_checkpoint_in_another_dtype_is_refused() -> None:
    saved = of_shapes({"w": (2,)})
    built = of_shapes({"w": (2,)}).to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"w \(2 float32 in the checkpoint, 2 bfloat16 in"):
        restore(built, optimizer_of(built), capture(saved, optimizer_of(saved), position(1)))


def test_moments_of_another_shape_are_refused() -> None:
    model = of_shapes({"w": (2,)})
    state = capture(model, optimizer_of(model), position(1))
    bent = replace(state, moments={"w": {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}})
    with pytest.raises(ModelError, match=r"w \(3 float32 in the checkpoint, 2 float32 in"):
        restore(model, optimizer_of(model), bent)


def test_a_run_that_moves_off_its_gpu_is_told_that_draws_differ(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    model = of_shapes({"w": (2,)})
    state = capture(model, optimizer_of(model), position(1))
    on_gpu = replace(state, random=replace(state.random, cuda=torch.zeros(16, dtype=torch.uint8)))
    restore(model, optimizer_of(model), on_gpu)
    assert "made on a GPU and this run is not: what is drawn at random" in caplog.text


def tiny_state(step: int) -> TrainState:
    """A state whose every tensor says which step it is of."""
    model = of_shapes({"w": (4, 4), "b": (4,)})
    optimizer = optimizer_of(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    return capture(model, optimizer, position(step))


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert recover(tmp_path / "absent") is None
    assert latest(tmp_path) is None
    for step in (100, 20, 99_999_999, 100_000_000):  # the last has a digit more
        save(tmp_path, tiny_state(step))
    for name in ("step-1x", "other", ".tmp-step-99999999.00"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-999999999").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-100000000"


def cut_short(path: Path) -> None:
    with (path / "weights.safetensors").open("r+b") as file:
        file.truncate(100)


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(content)


def rename_to(path: Path) -> None:
    shutil.copytree(path.with_name("step-00000001"), path, dirs_exist_ok=True)


DAMAGES = {
    "weights.safetensors has 100 bytes of": cut_short,
    "optimizer.safetensors is not what was written (its sha256 differs)": flip_a_bit,
    "state.json cannot be read (No such file": lambda path: (path / "state.json").unlink(),
    "manifest.json cannot be read (No such file": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is not a checkpoint's manifest": (
        lambda path: (path / "manifest.json").write_text('{"format": 1')
    ),
    "it is named step-00000002 and holds step 1": rename_to,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (save(tmp_path, tiny_state(step)) for step in (1, 2))
    DAMAGES[damage](second)
    assert latest(tmp_path) == first
    assert f"the checkpoint {second} is damaged and is not used: {damage}" in caplog.text
    with pytest.raises(
        OutputError, match=rf"step-00000002 is damaged: {re.escape(damage)}.*Resume"
    ):
        load(second)
    assert recover(tmp_path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]
    # What is kept from then on is counted among good ones only.
    save(tmp_path, tiny_state(2))
    prune(tmp_path, keep=1, best=None)
    assert latest(tmp_path) == second


def test_a_checkpoint_of_another_format_is_left_alone(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_state(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    said = "of format 1 and this version of upweight reads format 4. Resume with the version"
    for read in (latest, recover):
        with pytest.raises(OutputError, match=re.escape(said)):
            read(tmp_path)
    assert path.is_dir()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, tiny_state(step)) for step in (1, 2, 3, 4, 5)}
    prune(tmp_path, keep=2, best=paths[2])
    assert steps_in(tmp_path) == [2, 4, 5]
    prune(tmp_path, keep=2, best=paths[5])
    assert steps_in(tmp_path) == [4, 5]
    prune(tmp_path, keep=3, best=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, tiny_state(1))
    state = tiny_state(1)
    path = save(tmp_path, replace(state, position=replace(state.position, best=9.0)))
    assert load(path).position.best == 9.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_does_not_fit_leaves_the_others_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, tiny_state(1))
    # A file size limit refuses the write in the middle of it, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OutputError, match=r"step-00000002 cannot be written: File too large"):
            save(tmp_path, tiny_state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match=r"needs 248 bytes and its disk has 10 bytes free"):
        save(tmp_path, tiny_state(2))
    assert list(tmp_path.iterdir()) == [first]
    assert latest(tmp_path) == first


def test_what_a_kill_left_is_removed_and_what_it_displaced_is_put_back(tmp_path: Path) -> None:
    state = tiny_state(1)
    final = save(tmp_path, state)
    displaced = final.rename(tmp_path / ".old-step-00000001")
    (tmp_path / ".tmp-step-00000001.00").mkdir()
    (tmp_path / ".tmp-step-00000001.00" / "weights.safetensors").write_text("half")
    assert latest(tmp_path) == displaced
    assert recover(tmp_path) == final
    shutil.copytree(final, displaced)
    assert latest(tmp_path) == final
    assert recover(tmp_path) == final
    assert list(tmp_path.iterdir()) == [final]


# The processes that are killed are forks of one that has torch loaded: loading it takes seconds.
KILLED = """
import itertools, os, shutil, signal, sys
from pathlib import Path

import torch

import upweight.training.checkpoint, upweight.training.rundir
from upweight.training.moment import Position
from upweight.training.checkpoint import capture, prune, save

torch.set_num_threads(1)


def tiny_state(step):
    model = torch.nn.ParameterDict({"w": torch.full((4, 4), float(step))})
    optimizer = torch.optim.AdamW(model.parameters())
    return capture(model, optimizer, Position(step, 0.0, 0, 0, "reference", "config"))


def fork(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def say(text):
    os.write(1, (text + "\\n").encode())


def is_file(event):
    return event == "open" or event.startswith(("os.", "shutil."))

"""

LOOPED = """
def work():
    say(f"child {os.getpid()}")
    # A byte before every file operation: what is counted until the kill.
    sys.addaudithook(lambda event, arguments: is_file(event) and os.write(1, b"."))
    for step in itertools.count(2):
        save(folder, tiny_state(step))
        say(f"saved {step}")
        prune(folder, keep=1, best=None)


for line in sys.stdin:
    folder = Path(line.strip())
    save(folder, tiny_state(1))
    child = fork(work)
    os.waitpid(child, 0)
    say("dead")
"""

EVERY_OPERATION = """
state, again = tiny_state(2), tiny_state(1)
root = Path(sys.argv[1])
save(root / "begun", tiny_state(1))


def dying_before(operation, work):
    operations = itertools.count()

    def hook(event, arguments):
        if is_file(event) and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


for name, work in {
    "next": lambda folder: (save(folder, state), prune(folder, keep=1, best=None)),
    "same": lambda folder: save(folder, again),
}.items():
    for operation in itertools.count():
        folder = root / f"{name}-{operation}"
        shutil.copytree(root / "begun", folder)
        child = fork(lambda: dying_before(operation, lambda: work(folder)))
        if os.waitpid(child, 0)[1] == 0:
            say(f"{name} {operation}")
            break
"""


def test_a_kill_at_a_random_moment_loses_at_most_the_unfinished_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-c", KILLED + LOOPED], **pipes) as keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        for i in range(20):
            folder = tmp_path / str(i)
            keeper.stdin.write(f"{folder}\n".encode())
            child = int(keeper.stdout.readline().removeprefix(b"child "))
            said = b"".join(keeper.stdout.read(1) for _ in range(chance.randrange(300)))
            os.kill(child, signal.SIGKILL)
            for line in iter(keeper.stdout.readline, b""):
                said += line
                if line.endswith(b"dead\n"):
                    break
            last = max([1, *map(int, re.findall(rb"saved (\d+)\n", said))])
            found = latest(folder)
            assert found is not None
            state = load(found)
            assert state.position.step in (last, last + 1)
            assert (state.weights["w"] == state.position.step).all()
            assert recover(folder) == found
        keeper.stdin.close()
    assert keeper.returncode == 0


def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED + EVERY_OPERATION, str(tmp_path)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    counts = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    assert counts.keys() == {"next", "same"} and min(counts.values()) > 20
    for name, num_operations in counts.items():
        seen: list[int] = []
        for operation in range(num_operations):
            folder = tmp_path / f"{name}-{operation}"
            found = latest(folder)
            assert found is not None
            seen.append(load(found, verified=True).position.step)
            recovered = recover(folder)
            assert recovered is not None
            assert recovered.name == found.name.replace(".old-", "")
            assert all(p.name.startswith("step-") for p in folder.iterdir())
        assert seen == sorted(seen)
        assert set(seen) == ({1, 2} if name == "next" else {1})
