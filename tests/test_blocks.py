"""Faults that no small tree shows: attention paths that are wrong beyond one block."""

import functools
import math

import pytest
import torch

from oracles import SHAPES, loaded, random_trees
from test_attention import plain_kernel
from test_logprobs import half_only
from tiny import save_tiny
from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.models import attention, blocks, proof, tiles
from upweight.models.attention import Asked, layout_of
from upweight.models.blocks import fault_beyond_a_block
from upweight.models.load import load
from upweight.models.tiles import Heads, Tile

FLOAT = torch.float64


def asked(dtype=FLOAT, window=None, softcap=None, sinks=None):
    return Asked(Heads(4, 2), 16, 16, dtype, 0.3, window, softcap, sinks)


CHANGES = [{}, dict(window=8), dict(window=100_000), dict(softcap=0.7), dict(sinks=FLOAT)]


def on_cpu(monkeypatch):
    """The paths that belong to CUDA, by slow kernels that say the same."""
    plain = functools.partial(attention.varlen_attention, kernel=plain_kernel)
    monkeypatch.setattr(attention, "varlen_attention", plain)
    # torch refuses gradients on the CPU because its kernel for the CPU has none; its reference
    # computes them.
    guard = "torch.nn.attention.flex_attention._validate_device"
    monkeypatch.setattr(guard, lambda *tensors: None)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", ["dense", "tiles", "varlen", "flex"])
def test_a_right_path_holds_on_long_trees(monkeypatch, path, change):
    on_cpu(monkeypatch)
    assert fault_beyond_a_block(loaded(), path, {asked(**change)}) is None


@pytest.mark.parametrize("path", ["dense", "tiles", "varlen"])
def test_rounding_in_bf16_is_a_third_of_what_is_allowed(monkeypatch, path):
    on_cpu(monkeypatch)
    monkeypatch.setitem(blocks.TOLERANCE, torch.bfloat16, blocks.TOLERANCE[torch.bfloat16] / 3)
    assert fault_beyond_a_block(loaded(), path, {asked(torch.bfloat16)}) is None


def cut_at_the_tile(spans, most_rows, window):
    """A tile that begins inside a response does not read what the response said before."""
    cut = tiles_as_they_are(spans, most_rows, window)
    owns = [range(max(t.start, t.keys[1].start), t.keys[1].stop) for t in cut]
    return [Tile(t.start, t.stop, (t.keys[0], own)) for t, own in zip(cut, owns, strict=True)]


tiles_as_they_are = tiles.cut


def beyond(num, plant):
    """Attention that is right in the first `num` tokens of what it is given."""

    def planted(compute):
        def attend(query, key, value, *rest, **options):
            if plant == "rows":
                out = compute(query, key, value, *rest, **options)
                return torch.cat([out[:, :, :num], out[:, :, num:].roll(1, 2)], 2)
            if plant == "nan":
                out = compute(query, key, value, *rest, **options)
                return torch.cat([out[:, :, :num], out[:, :, num:] * math.nan], 2)
            # the gradient of what lies behind is lost
            key = torch.cat([key[:, :, :num], key[:, :, num:].detach()], 2)
            return compute(query, key, value, *rest, **options)

        return attend

    return planted


FULL = ("tiles", "tiled_attention", "float32")
HALF = ("varlen", "varlen_attention", "bfloat16")


@pytest.mark.parametrize(
    ("path", "name", "dtype", "plant"),
    [
        (*FULL, "cut"),
        *[(*FULL, beyond(192, plant)) for plant in ("rows", "keys", "nan")],
        *[(*HALF, beyond(128, plant)) for plant in ("rows", "keys", "nan")],
    ],
)
def test_a_fault_beyond_the_first_block_is_found_on_long_trees_alone(
    tmp_path, monkeypatch, path, name, dtype, plant
):
    folder = save_tiny(str(tmp_path))
    compute = getattr(attention, name)
    if path == "varlen":
        compute = functools.partial(compute, kernel=half_only)
    monkeypatch.setattr(attention, name, compute)
    assert load(folder, device="cpu", dtype=dtype, path=path).plan.attention == path
    if plant == "cut":
        monkeypatch.setattr(tiles, "cut", cut_at_the_tile)
    else:
        monkeypatch.setattr(attention, name, plant(compute))
    with pytest.raises(ModelError, match=r"on sequences of up to 470 tokens a row of its output"):
        load(folder, device="cpu", dtype=dtype, path=path)
    monkeypatch.setattr(proof, "fault_beyond_a_block", lambda *_: None)
    assert load(folder, device="cpu", dtype=dtype, path=path).plan.attention == path


def test_where_a_path_is_wrong_on_long_trees_the_next_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "cut", cut_at_the_tile)
    plan = load(save_tiny(str(tmp_path)), device="cpu", dtype="float32").plan
    assert plan.shared and plan.attention == "dense"


@pytest.mark.parametrize("window", [100, 100_000])
def test_a_window_that_is_lost_on_long_trees_is_found(monkeypatch, window):
    plain = attention.tiled_attention
    whole = {}

    def without(query, key, value, made, scale):
        return plain(query, key, value, whole["tiles"], scale)

    def tiles_of(spans, position, window, heads, dtype):
        whole["tiles"] = tiles.tiles_of(spans, position, None, heads, dtype)
        return whole["tiles"]

    case = asked(window=window)
    assert fault_beyond_a_block(loaded(), "tiles", {case}) is None
    monkeypatch.setattr(attention, "tiled_attention", without)
    monkeypatch.setattr(attention, "tiles_of", tiles_of)
    assert fault_beyond_a_block(loaded(), "tiles", {case}) is not None


def test_layers_say_all_that_decides_how_they_attend():
    lm = loaded("gemma2")
    forest = collate(random_trees(SHAPES))
    layout = layout_of(forest, "tiles")
    lm.causal.base_model(
        input_ids=forest.token_ids[None],
        position_ids=forest.position[None],
        use_cache=False,
        forest_layout=layout,
    )
    cap = lm.causal.config.attn_logit_softcapping
    said = (Heads(4, 2), 8, 8, torch.float32, 8**-0.5)
    assert layout.asked == {Asked(*said, window, cap, None) for window in (8, None)}
