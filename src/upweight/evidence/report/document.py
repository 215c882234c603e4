"""One self-contained page: head, style, sections, script."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from upweight.errors import OutputError
from upweight.evidence.report.markup import esc


def document(
    title: str, header: str, sections: Iterable[tuple[str, str]], version: str = ""
) -> str:
    """The page of a header and (title, body) sections, of which empty ones are left out.

    A content security policy forbids every load and every script but ours.
    """
    style, script = _asset("style.css"), _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    shown = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{_anchor(name)}">{esc(name)}</a>' for name, _ in shown)
    bodies = "".join(
        f'<section id="{_anchor(name)}"><h2>{esc(name)}</h2>{body}</section>'
        for name, body in shown
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{esc(title)}</title><style>{style}</style></head>"
        f'<body>{header}<nav aria-label="Sections">{links}</nav>'
        f"<main>{bodies}</main><footer>upweight {esc(version)}</footer>"
        f"<script>{script}</script></body></html>\n"
    )


def write_page(target: Path, page: str, again: str) -> Path:
    """Writes the page whole or not at all. `again` says what to do once there is room.

    Raises OutputError when it cannot be written.
    """
    temporary = target.with_name(f".tmp-{target.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(page.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror}. Free some space, or give yourself "
            f"permission to write there, then {again}."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _asset(name: str) -> str:
    return files("upweight.evidence.report").joinpath(name).read_text(encoding="utf-8")
