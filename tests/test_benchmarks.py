"""The benchmarks begin: every task of our worker, and the GPU command's rehearsal, on tiny models.

What is measured means nothing here. TRL's side needs TRL, and has no test.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import gpu
import results
import upweight_worker
import watch
from on_gpu.cells import Case, Steps, blank
from on_gpu.models import TOY_SIZES, as_saved_in_bf16, build, random_trees
from on_gpu.speed import adapted, measure
from protocol import Spec
from runs import furnish
from upweight.data.pack import collate
from upweight.models import head
from upweight.training.loop import Full, too_large

PAIRS_PER_STEP = 4


PROGRAMS = {p.stem for p in Path(upweight_worker.__file__).parent.glob("*.py")} - {"trl_worker"}


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_a_program_finds_all_that_it_imports(program):
    importlib.import_module(program)


def test_what_the_cost_of_the_watch_is_read_from_exists():
    for owner, name in watch.WATCHED:
        assert callable(getattr(owner, name))
    with pytest.MonkeyPatch.context() as patched:
        spent = watch.timing(patched.setattr)
    assert list(spent) == [name for _, name in watch.WATCHED] and not any(spent.values())


def run(task, folder, monkeypatch, *, steps=2, **options):
    """The events of a task, in this process and on a thread."""
    furnish(folder, monkeypatch)
    monkeypatch.setattr(head, "_is_plain", head._is_plain)  # which a switch may replace
    events = []
    spec = Spec(
        task,
        "model",
        "pairs.jsonl",
        steps,
        PAIRS_PER_STEP,
        threads=1,
        scratch=str(folder),
        **options,
    )
    upweight_worker.main(spec, lambda event, **values: events.append({"event": event, **values}))
    json.dumps(events)  # as a worker says them
    return events


@pytest.mark.parametrize("settings", [{}, {"bench": "two passes"}])
def test_the_worker_trains_for_as_many_steps_as_it_is_told(tmp_path, monkeypatch, settings):
    events = run("train", tmp_path, monkeypatch, settings=settings)
    assert [e["event"] for e in events] == ["side", "reference", "step", "step"]
    assert [e["num_pairs"] for e in events[2:]] == [PAIRS_PER_STEP] * 2


def test_the_worker_scores_every_pair_before_training(tmp_path, monkeypatch):
    _, *pairs = run("score", tmp_path, monkeypatch)
    assert len(pairs) == 24 and all(pair["logp_chosen"] < 0 for pair in pairs)


@pytest.mark.parametrize("lora", [False, True])
def test_the_worker_prices_dpo_and_sft_in_turn(tmp_path, monkeypatch, lora):
    _, *prices = run("price", tmp_path, monkeypatch, lora=lora)
    assert [p["objective"] for p in prices] == ["dpo", "sft", "sft", "dpo"]


def test_the_worker_measures_the_peak_at_the_models_shapes(tmp_path, monkeypatch):
    assert run("peak", tmp_path, monkeypatch)[1]["flops"] > 0


def test_no_task_of_the_worker_is_without_a_test():
    assert set(upweight_worker.TASKS) == {"train", "score", "price", "peak"}


def test_the_gpu_command_fills_every_cell_of_its_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--minutes", "0.1"])
    assert gpu.main() == 0
    record = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert all(check["holds"] for check in record["checks"])
    assert len(record["cells"]) == 2 * 3 * 2
    assert not [cell["note"] for cell in record["cells"] if cell["failed"]]


def test_what_is_timed_with_lora_is_what_a_run_trains():
    lm = as_saved_in_bf16(build("llama", TOY_SIZES[1].config, torch.bfloat16, "cpu"))
    lm = adapted(lm)
    narrow = {n for n, p in lm.model.named_parameters() if p.dtype == torch.bfloat16}
    assert len(narrow) == 14 and all(".base_layer." in name for name in narrow)
    # The residual stream is fp32, the products are autocast's, on either side.
    assert lm.dtype == torch.float32 and lm.compute_dtype == torch.bfloat16


def measured(attempt):
    """(a cell, the size that it ended at) of sizes 8, 4 and 2."""
    size = TOY_SIZES[0]
    lm = build("llama", size.config, torch.bfloat16, "cpu")
    case = Case(size, "8/4/4", tuple(random_trees([(8, 4, 4)], lm.vocab_size)), 1.0)
    cell = blank(case, "upweight", "tiles")
    return cell, measure(cell, lm, case, attempt, [8, 4, 2], 0.0)


def test_a_lack_of_memory_in_the_engines_words_is_followed_by_half_as_much():
    def limited(lm, trees, size, until):
        if size > 2:
            raise too_large("step 1", Full(collate(trees), torch.OutOfMemoryError("no room")))
        steps = Steps(until)
        steps.ended()
        steps.ended()
        return steps

    cell, size = measured(limited)
    assert (size, cell.note, cell.failed, len(cell.seconds)) == (2, "", False, 2)


def test_a_bug_in_a_cell_stands_in_the_table_and_ends_nothing(capsys):
    def broken(lm, trees, size, until):
        raise TypeError("'Reference' object is not callable")

    cell, size = measured(broken)
    assert size == 8 and cell.failed and cell.note.startswith("TypeError: 'Reference'")
    assert "Traceback" in capsys.readouterr().err
