"""One thread: the tests' models are tiny, and threads that wait for each other are slower.

Modules that name shapes are checked at every call; of the others pyright knows as much, and a
check of every call of theirs is a third of a short run's time.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import config, install_import_hook

torch.set_num_threads(1)

SOURCE = Path(__file__).parents[1] / "src"
SHAPED = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in sorted((SOURCE / "upweight").rglob("*.py"))
    if "from jaxtyping import" in file.read_text()
]
install_import_hook(SHAPED, "beartype.beartype")


@pytest.fixture(autouse=True)
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked at every call, which is up to half of a long run's time: only the many
    short tests ask."""
    held = config.jaxtyping_disable
    config.update("jaxtyping_disable", "slow" in request.keywords)
    yield
    config.update("jaxtyping_disable", held)
