"""bitsandbytes, which nobody needs who does not ask for it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from upweight.errors import ModelError


def package(part: str, asked: str, extra: str) -> Any:
    """A module of bitsandbytes. Raises ModelError saying who asked for it where it is missing."""
    try:
        with quiet():
            return importlib.import_module(f"bitsandbytes.{part}")
    except ImportError as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"{asked} needs the package bitsandbytes, which cannot be imported ({said}). "
            f"Run: pip install 'upweight[{extra}]'"
        ) from error


@contextmanager
def quiet() -> Generator[None]:
    """Around whatever may be the first to import bitsandbytes, such as peft where both are there:
    it then warns of a product for the CPU that is missing, which is not used here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
