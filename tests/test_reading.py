import functools

import pytest
import torch

from oracles import SHAPES, loaded, random_trees, tree_of
from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.evidence.evaluate import score_trees
from upweight.models import reference as references
from upweight.models.load import fingerprint
from upweight.models.logprobs import token_logps
from upweight.models.reading import read_trees
from upweight.models.reference import fill, open_reference

TREES = random_trees(SHAPES)


def with_room(logps, tokens, error=torch.OutOfMemoryError):
    """A device that runs out of memory beyond so many tokens at once, and what it was asked."""
    asked = []

    def limited(*given):
        forest = given[-1]
        asked.append(forest.num_tokens)
        if forest.num_tokens > tokens:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return logps(*given)

    return limited, asked


def by_row(read):
    found = {}
    for forest, logps in read:
        pieces = logps.split(forest.tokens_per_response.tolist())
        ids = [i for tree in forest.trees for i in tree.ids]
        found |= dict(zip(ids, pieces, strict=True))
    return found


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize("room", [60, 33, 30, 25])
def test_every_tree_is_read_once_however_little_fits(room, error):
    lm, told = loaded(), []
    logps = functools.partial(token_logps, lm)
    with torch.no_grad():
        wanted = by_row(read_trees(logps, TREES, 1000))
        limited, asked = with_room(logps, room, error)
        got = by_row(read_trees(limited, TREES, 1000, told.append))
    assert got.keys() == wanted.keys()
    for where, logps in wanted.items():
        torch.testing.assert_close(got[where], logps, rtol=1e-5, atol=1e-5)
    # Halved where it failed: 80 tokens, half of them, half of the largest bin that is left.
    assert asked[0] == sum(tree.num_tokens for tree in TREES) and told[0] == asked[0] // 2
    assert told == sorted(told, reverse=True) and told[-1] >= 2


def test_what_cannot_be_smaller_is_an_error_that_names_its_row():
    limited, _ = with_room(functools.partial(token_logps, loaded()), 16)
    said = r"rows\.jsonl:1 ran out of memory: 21 tokens, .* can't allocate .*data\.max_length"
    with torch.no_grad(), pytest.raises(ModelError, match=said):
        list(read_trees(limited, TREES, 1000))


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def broken(forest):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(read_trees(broken, TREES, 1000))


def test_a_reference_pass_that_does_not_fit_goes_on_with_smaller_bins(tmp_path, monkeypatch):
    lm, told = loaded(), []
    # Merged into one tree of one prompt, which is read some responses at a time.
    trees = [*TREES, *(tree_of((5, 6, 7), [(8, i), (9, i, 10)], line=9 + i) for i in range(9))]
    whole = open_reference(fingerprint(lm), lm, tmp_path / "whole")
    cut = open_reference(fingerprint(lm), lm, tmp_path / "cut")
    fill(whole, lm, trees, 1000)
    limited, _ = with_room(token_logps, 25)
    monkeypatch.setattr(references, "token_logps", limited)
    computed = fill(cut, lm, trees, 1000, on_smaller=told.append)
    assert computed == sum(len(tree.responses) for tree in trees) and told
    forest = collate(trees)
    torch.testing.assert_close(cut.logps(forest), whole.logps(forest), rtol=1e-5, atol=1e-5)


def test_an_evaluation_that_does_not_fit_gives_the_same_rows(tmp_path, monkeypatch):
    from upweight.evidence import evaluate

    lm, told = loaded(), []
    wanted = score_trees(lm, TREES, None, 0.1, 1000)
    limited, _ = with_room(token_logps, 25)
    monkeypatch.setattr(evaluate, "token_logps", limited)
    got = score_trees(lm, TREES, None, 0.1, 1000, told.append)
    assert told and [row["row"] for row in got] == [row["row"] for row in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours["logp_chosen"] == pytest.approx(theirs["logp_chosen"], rel=1e-5)
        assert ours["logp_rejected"] == pytest.approx(theirs["logp_rejected"], rel=1e-5)
