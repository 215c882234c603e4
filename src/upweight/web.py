"""JSON to an address and what it answers: a reward behind HTTP, a server that draws answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

ADDRESSES = ("http://", "https://")

LONGEST_SHOWN = 200


class NoAnswer(Exception):
    """Why there is none, as it follows the address in a sentence."""


class _Stays(urllib.request.HTTPRedirectHandler):
    """Another address would be asked without the document, and be told the key."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stays)


def names_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # A port that is none is a ValueError only when it is asked for.
        return url.startswith(ADDRESSES) and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def post(
    url: str,
    document: object,
    timeout_seconds: float,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """What the address answers to a document that JSON has a form for. Raises NoAnswer."""
    request = urllib.request.Request(
        url,
        data=json.dumps(document, allow_nan=False).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
        method="POST",
    )
    try:
        with _OPENER.open(request, timeout=timeout_seconds) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        said = b""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            said = error.read(2000)
        raise NoAnswer(f"answered {error.code} {error.reason}: {shown(said)}") from None
    except TimeoutError:
        raise NoAnswer(f"gave no answer within {timeout_seconds:g} seconds") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # ValueError: a host name or port that is none.
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NoAnswer(f"cannot be reached: {shown(reason)}") from None


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
