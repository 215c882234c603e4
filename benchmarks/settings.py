"""The settings that are tried: TRL's, and what upweight's engine can switch. One row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

Settings = Mapping[str, Any]

_PLAIN: Settings = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}

DEFAULTS: Settings = {}
"""What TRL does when it is left alone: 8 pairs at once, checkpointing, the reference model in
memory and computed in every step."""

CANDIDATES: Mapping[str, Settings] = {
    "1 at once": {"per_device_train_batch_size": 1, **_PLAIN},
    "2 at once": {"per_device_train_batch_size": 2, **_PLAIN},
    "4 at once": {"per_device_train_batch_size": 4, **_PLAIN},
    "8 at once": {"per_device_train_batch_size": 8, **_PLAIN},
    "16 at once": {"per_device_train_batch_size": 16, **_PLAIN},
    "2 at once, checkpointing": {
        "per_device_train_batch_size": 2,
        "precompute_ref_log_probs": True,
    },
    "2 at once, reference in memory": {
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
    },
    "2 at once, eager attention": {
        "per_device_train_batch_size": 2,
        "model_init_kwargs": {"attn_implementation": "eager"},
        **_PLAIN,
    },
}
"""What `--search` tries. TRL 1.16 has no padding_free (it warns and pads), Liger kernels need
Triton, and sorting by length would change the order of the rows."""

BEST = ("1 at once", "2 at once", "4 at once")
"""The candidates that every comparison tries, since which is fastest depends on the rows;
`--search` tries all of them, `--best` takes others."""

ABLATIONS: Mapping[str, Settings] = {
    "sharing off": {"compute.sharing": False},
    "packing off": {"batch.tokens_per_bin": 1},
    "attention dense": {"compute.attention": "dense"},
    "checkpointing on": {"compute.checkpointing": True},
    "fused head off": {"bench": "two passes"},
    "compiled layers": {"compute.compile": True},
}
"""One switch of upweight's engine turned from what it is by default. A bin of one token holds one
tree. The cached reference needs no run of its own: without it, every step pays the reference pass
that the first run was timed with."""


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words, values as in YAML. Raises SystemExit for a word without "="."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SystemExit(f"{word} is not KEY=VALUE")
        found[key] = yaml.safe_load(value)
    return found
