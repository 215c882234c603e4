import os
import signal
from itertools import pairwise

import pytest
import torch

from oracles import SHAPES, loaded, random_trees, tree_of
from upweight.data.pack import bins_of_step, collate
from upweight.errors import OutputError, Refusal
from upweight.models import reference
from upweight.models.load import fingerprint
from upweight.models.logprobs import token_logps
from upweight.models.reference import fill, open_reference, response_key, verify


def filled(lm, trees, root, **options):
    reference = open_reference(fingerprint(lm), lm, root)
    return reference, fill(reference, lm, trees, 40, **options)


def test_what_is_kept_is_what_the_model_gives_and_is_found_again(tmp_path):
    lm, trees = loaded(), random_trees(SHAPES)
    reference, computed = filled(lm, trees, tmp_path)
    assert computed == sum(len(t.responses) for t in trees)
    forest = collate(trees)
    with torch.no_grad():
        live = token_logps(lm, forest)
    torch.testing.assert_close(reference.logps(forest), live, rtol=1e-5, atol=1e-5)
    again = open_reference(fingerprint(lm), lm, tmp_path)
    assert again.missing(trees) == []
    assert torch.equal(again.logps(forest), reference.logps(forest))
    assert fill(again, lm, trees, 40) == 0
    assert verify(again, lm, trees) < 1e-4


def test_a_pass_that_was_cut_off_computes_only_the_rest(tmp_path):
    lm, trees = loaded(), random_trees(SHAPES)

    class Cut(Exception):
        pass

    def cut(done, total):
        if done > 20:
            raise Cut

    with pytest.raises(Cut):
        filled(lm, trees, tmp_path, seconds_per_part=0.0, on_progress=cut)
    reference, computed = filled(lm, trees, tmp_path)
    assert 0 < computed <= sum(len(t.responses) for t in trees)
    assert reference.missing(trees) == []


def test_a_pass_that_is_killed_leaves_what_it_had_written(tmp_path):
    lm, trees = loaded(), random_trees([(9, 4, 6)] * 12)
    child = os.fork()
    if child == 0:

        def killed(done, total):
            if done > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)

        filled(lm, trees, tmp_path, seconds_per_part=0.0, on_progress=killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    reference, computed = filled(lm, trees, tmp_path)
    # Two trees a bin: what was read before the fourth was written.
    assert computed == 24 - 12
    assert reference.missing(trees) == []
    assert verify(reference, lm, trees, num=12) < 1e-4


def test_many_answers_to_one_prompt_stay_within_a_bin(tmp_path):
    lm, prompt = loaded(), tuple(range(20, 30))
    trees = [tree_of(prompt, [(40 + i, 50), (90 + i,)], line=i + 1) for i in range(12)]
    seen = [0]
    _, computed = filled(lm, trees, tmp_path, on_progress=lambda done, total: seen.append(done))
    assert computed == 24
    assert max(b - a for a, b in pairwise(seen)) <= 40


def test_a_part_that_cannot_be_read_is_computed_anew(tmp_path):
    lm, trees = loaded(), random_trees(SHAPES)
    reference, computed = filled(lm, trees, tmp_path)
    for part in reference.folder.glob("part-*.parquet"):
        part.write_bytes(b"half a fi")
    assert filled(lm, trees, tmp_path)[1] == computed


def test_other_weights_or_another_dtype_are_another_reference():
    lm = loaded()
    before = fingerprint(lm)
    assert fingerprint(loaded()) == before
    lm.compute_dtype = torch.bfloat16
    assert fingerprint(lm) != before
    lm.compute_dtype = torch.float32
    with torch.no_grad():
        next(lm.model.parameters())[3, 5] += 1e-6
    assert fingerprint(lm) != before


def test_a_key_tells_prompt_from_response():
    keys = {response_key("f", (1, 2), (3,)), response_key("f", (1,), (2, 3))}
    keys |= {response_key("g", (1,), (2, 3)), response_key("f", (1, 2, 3), ())}
    assert len(keys) == 4


def test_values_of_another_model_are_refused_with_the_row(tmp_path):
    lm, trees = loaded(), random_trees(SHAPES)
    reference, _ = filled(lm, trees, tmp_path)
    for key, row in reference.table.items():
        reference.table[key] = row + 0.05
    with pytest.raises(Refusal, match=r"rows\.jsonl:\d differs by 0\.05") as refused:
        verify(reference, lm, trees)
    assert refused.value.code == "UW107"


@pytest.mark.parametrize(("num_tokens", "is_rounding"), [(1, True), (4, True), (100, False)])
def test_a_few_tokens_may_all_round_far_where_many_may_not(num_tokens, is_rounding, tmp_path):
    """In bf16 tokens are some 0.03 off, give or take as much: 0.28 is the mean of no hundred."""
    lm = loaded()
    lm.compute_dtype = torch.bfloat16
    trees = [tree_of((5, 6, 7), (tuple(range(9, 9 + num_tokens)),))]
    reference, _ = filled(lm, trees, tmp_path)
    for key, row in reference.table.items():
        reference.table[key] = row + 0.28
    if is_rounding:
        assert verify(reference, lm, trees) == pytest.approx(0.28, abs=0.05)
    else:
        with pytest.raises(Refusal, match=r"differs by 0\.\d+ nats per token .*rounding: 0\.14"):
            verify(reference, lm, trees)


def test_values_that_are_not_numbers_are_refused(tmp_path):
    lm, trees = loaded(), random_trees(SHAPES)
    reference, _ = filled(lm, trees, tmp_path)
    for key, row in reference.table.items():
        reference.table[key] = row * float("nan")
    with pytest.raises(Refusal, match="UW107"):
        verify(reference, lm, trees)


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    lm = loaded()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="Set UPWEIGHT_CACHE"):
        open_reference("f" * 64, lm, tmp_path / "file")


def test_the_trees_of_a_step_are_read_in_the_bins_that_train(tmp_path, monkeypatch):
    trees = random_trees([(6, 3, 5), (4, 2, 4), (5, 7, 1), (3, 4, 6), (8, 2, 3), (9, 9)], seed=7)
    steps, read = [[trees[i] for i in step] for step in ((4, 0, 3), (2, 1))], []
    lm = loaded()
    monkeypatch.setattr(
        reference,
        "token_logps",
        lambda lm, forest: read.append(set(forest.trees)) or token_logps(lm, forest),
    )
    kept = open_reference(fingerprint(lm), lm, tmp_path)
    assert fill(kept, lm, trees, 28, steps=steps) == 11
    wanted = [set(group) for step in steps for group in bins_of_step(step, 28)]
    assert {frozenset(group) for group in read} == {*map(frozenset, wanted), frozenset(trees[5:])}
    assert len(wanted) == 3 and not kept.missing(trees)
    # Of what is known nothing is read again, but for those that share a bin with what is not.
    read.clear()
    del kept.table[response_key(kept.fingerprint, trees[2].prompt, trees[2].responses[1])]
    assert fill(kept, lm, trees, 28, steps=steps) == 1
    assert read == [{trees[2], trees[1]}]
