"""One diagnosis as a page, and the page as text for a terminal or as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

UNDETECTED = "upweight does not detect this yet; how to look for it by hand:"


@dataclass(frozen=True, slots=True)
class Page:
    """What a code means and what to do about it. Names in backticks are real ones.

    `severity` is what becomes of the run where the code is found, but for `warns_of`, the cases of
    a code that refuses of which it only warns. `found_by` says what is measured: by
    upweight where `detectors` names the functions ("module:function") that raise or report the
    code, else by the reader. `guarded_by` is what upweight does, without the code, so that it does
    not come about or leaves a count. `causes` has the most likely first.
    """

    code: str
    title: str
    severity: Literal["refuses", "warns"]
    meaning: str
    found_by: str
    causes: tuple[str, ...]
    do: tuple[str, ...]
    source: str = ""
    guarded_by: str = ""
    detectors: tuple[str, ...] = ()
    warns_of: str = ""

    @property
    def detected(self) -> bool:
        """Whether anything in upweight raises or reports the code."""
        return bool(self.detectors)


@dataclass(frozen=True, slots=True)
class Family:
    """The codes that begin alike, and what they are about."""

    prefix: str
    title: str
    pages: tuple[Page, ...]


def effect(page: Page) -> str:
    """What detecting the code does to a run."""
    if page.severity == "warns":
        return "warns, and the run goes on"
    return "stops the run, or warns" if page.warns_of else "stops the run"


def _effect_line(page: Page) -> str:
    said = "stops the run" if page.warns_of else effect(page)
    more = f" Only warns of {page.warns_of}." if page.warns_of else ""
    return f"{said.capitalize()}.{more}" if page.detected else f"Once detected, it {said}.{more}"


def _parts(page: Page) -> Iterator[tuple[str, str | Sequence[str]]]:
    """Headings with a paragraph or a list; backticks mark names."""
    yield "What it means", page.meaning
    if page.guarded_by:
        yield "What upweight does about it", page.guarded_by
    found = page.found_by if page.detected else f"{UNDETECTED} {page.found_by}"
    yield "How it is found", found
    yield "Likely causes", page.causes
    yield "What to do", page.do
    if page.source:
        yield "Source", page.source


def as_text(page: Page, width: int = 80) -> str:
    """The page for a terminal: headings at the margin, what belongs to them indented by two."""
    lines = [f"{page.code}  {page.title}", *_wrapped(_effect_line(page), width, "  ", "  ")]
    for heading, body in _parts(page):
        lines += ["", heading]
        if isinstance(body, str):
            lines += _wrapped(body, width, "  ", "  ")
        else:
            for item in body:
                lines += _wrapped(item, width, "  - ", "    ")
    return "\n".join(lines)


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text.replace("`", ""),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def list_as_text(families: Sequence[Family]) -> str:
    """Every code with its title, by family."""
    blocks = [
        "\n".join([family.title, *(f"  {page.code}  {page.title}" for page in family.pages)])
        for family in families
    ]
    return "\n\n".join([*blocks, "A page: upweight explain CODE"])


def as_markdown(page: Page) -> str:
    """The page as a section of a Markdown document."""
    blocks = [f"### {page.code}", f"**{page.title}.** {_linked(_effect_line(page))}"]
    for heading, body in _parts(page):
        if isinstance(body, str):
            blocks.append(f"*{heading}.* {_linked(body)}")
        else:
            blocks += [f"*{heading}.*", "\n".join(f"- {_linked(item)}" for item in body)]
    return "\n\n".join(blocks) + "\n"


def list_as_markdown(families: Sequence[Family]) -> str:
    """The index and every page: docs/codes.md."""
    head = (
        "# Diagnosis codes\n\n"
        "<!-- Written by scripts/write_docs from src/upweight/trust/codes. -->\n\n"
        "Each code names one way in which a run can finish and be wrong. `upweight explain CODE` "
        "prints the same pages. A code that upweight does not detect yet has instructions for "
        "looking by hand.\n\n"
        "| code | title | when detected | detected |\n|---|---|---|---|\n"
    )
    rows = [
        f"| [{page.code}](#{page.code.lower()}) | {page.title} | {effect(page)} | "
        f"{'yes' if page.detected else 'not yet'} |\n"
        for family in families
        for page in family.pages
    ]
    parts = [
        "\n".join([f"## {family.title}\n", *map(as_markdown, family.pages)]) for family in families
    ]
    return head + "".join(rows) + "\n" + "\n".join(parts)


def _linked(text: str) -> str:
    """arXiv numbers and other codes as links."""
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"\bUW\d{3}\b", lambda m: f"[{m[0]}](#{m[0].lower()})", text)
