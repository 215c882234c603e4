"""One thread: the tests' models are tiny, and threads that wait for each other are slower."""

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked at every call, which is up to half of a long run's time: only the many
    short tests ask."""
    held = config.jaxtyping_disable
    config.update("jaxtyping_disable", "slow" in request.keywords)
    yield
    config.update("jaxtyping_disable", held)
