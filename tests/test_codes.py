from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from upweight import cli
from upweight.config import Watch, load_run
from upweight.config.keys import keys
from upweight.data import account
from upweight.errors import UpweightError
from upweight.evidence.records.ledger import SCHEMA
from upweight.evidence.report import verdict
from upweight.models import probes, proof, reference
from upweight.recipes.best import KL, SAMPLED
from upweight.stats import FEWEST
from upweight.training import agreement
from upweight.training.rundir import RECORDS
from upweight.trust.codes import (
    CODES,
    FAMILIES,
    Page,
    as_markdown,
    as_text,
    effect,
    list_as_markdown,
    list_as_text,
    page,
)
from upweight.trust.watch import RECENT, curves, orders

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "upweight"
CODE = re.compile(r"\bUW\d{3}\b")
NUMBERS = (*range(101, 110), *range(201, 213), *range(301, 310), 401, 402)
EXPECTED = [f"UW{number}" for number in NUMBERS]
PAGES = pytest.mark.parametrize("found", CODES.values(), ids=CODES)


def prose(found: Page) -> str:
    return "\n".join(
        [found.title, found.meaning, found.found_by, found.guarded_by, *found.causes, *found.do]
    )


def names(found: Page) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", prose(found))


@functools.cache
def codes_in_functions() -> dict[str, set[str]]:
    """For each "module:function" of the package the codes in its strings, docstrings aside.

    The command line only shows what others raise, and names a code as an example.
    """
    found: dict[str, set[str]] = {}
    for file in set(SOURCE.rglob("*.py")) - {SOURCE / "cli.py"}:
        module = ".".join(("upweight", *file.relative_to(SOURCE).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[ast.get_docstring(node) is not None :]
            texts = [
                n.value for part in body for n in ast.walk(part) if isinstance(n, ast.Constant)
            ]
            codes = {code for t in texts if isinstance(t, str) for code in CODE.findall(t)}
            if codes:
                found[f"{module.removesuffix('.__init__')}:{node.name}"] = codes
    return found


def test_the_table_has_every_code_once_in_order() -> None:
    assert list(CODES) == EXPECTED
    assert sum(len(family.pages) for family in FAMILIES) == len(EXPECTED)


def test_each_code_is_in_its_family() -> None:
    assert all(p.code.startswith(family.prefix) for family in FAMILIES for p in family.pages)


@PAGES
def test_a_page_has_all_its_parts_and_they_end_in_full_stops(found: Page) -> None:
    assert found.severity in ("refuses", "warns")
    assert found.title and not found.title.endswith(".")
    sentences = [found.meaning, found.found_by, *found.causes, *found.do]
    assert found.causes and found.do
    assert [s for s in sentences if not s.endswith(".")] == []
    assert not found.guarded_by or found.guarded_by.endswith(".")
    assert prose(found).isascii()
    assert not re.search(r"  |\s,|\.\.", prose(found).replace("\n", "|"))


@PAGES
def test_a_page_says_that_a_code_is_detected_exactly_where_the_source_raises_it(
    found: Page,
) -> None:
    raising = {where for where, codes in codes_in_functions().items() if found.code in codes}
    assert set(found.detectors) == raising
    assert found.detected == bool(raising)


def test_what_is_raised_as_a_refusal_has_a_page_that_refuses() -> None:
    raised = {
        node.args[0].value
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refusal"
        if isinstance(node.args[0], ast.Constant)
    }
    assert raised >= {"UW101", "UW107", "UW109", "UW303", "UW401", "UW402"}
    assert {code for code in raised if CODES[code].severity == "warns"} == set()


def test_every_code_in_the_source_has_a_page() -> None:
    used = {code for codes in codes_in_functions().values() for code in codes}
    assert used >= {"UW105", "UW107", "UW209", "UW303"}
    assert used <= set(CODES)


@PAGES
def test_each_detector_can_be_imported(found: Page) -> None:
    for where in found.detectors:
        module, name = where.split(":")
        assert callable(getattr(importlib.import_module(module), name))


@PAGES
def test_codes_that_a_page_mentions_exist(found: Page) -> None:
    assert set(CODE.findall(prose(found))) <= set(CODES) - {found.code}


def problem_of(name: str) -> str | None:
    """Why a name between backticks is none, or None."""
    if name.startswith("upweight "):
        words = shlex.split(name)[1:]
        if len(words) > 1:
            cli._parser().parse_args(words)
        else:
            with pytest.raises(SystemExit, match="^0$"):
                cli._parser().parse_args([*words, "--help"])
        return None
    if name.startswith("--"):
        # Flags of a command that the page has named before, with their values or without.
        words = shlex.split(name)
        cli._parser().parse_args(["score", *words, *(["1"] if len(words) == 1 else [])])
        return None
    if "=" in name:
        load_run(None, ["model=m", "data=d", name])
        return None
    if name in keys() or name.rstrip("/") in RECORDS:
        return None
    return None if name in OTHER_NAMES else f"{name} is no key, file, metric or field"


def other_names() -> Iterator[str]:
    """Fields of records, and the flags, functions and variables that pages may name."""
    yield from account.Account().to_json()
    yield from account.REASONS
    yield from SCHEMA.names
    yield from ("logp", "tokens", "policy_tokens", "reference_tokens", "reference_fingerprint")
    train = (SOURCE / "training").glob("*.py")
    sources = "".join(f.read_text(encoding="utf-8") for f in (*train, SOURCE / "recipes/train.py"))
    yield from re.findall(r'"((?:rewards|logps|logratios|tokens)/\w+|loss|grad_norm)"', sources)
    yield from ("rewards/accuracies_low", "rewards/accuracies_high")
    yield from (*KL, *SAMPLED)
    yield from ("dpo", "response_logps", "pair_logps")
    yield from ("model.train()",)
    yield from ("UPWEIGHT_CACHE", "eos_token", "eos_token_id", "prompt")
    yield from (probes.FILE, "messages", "prompt_ids")


OTHER_NAMES = set(other_names())


@PAGES
def test_each_key_command_file_and_field_that_a_page_names_exists(found: Page) -> None:
    assert [problem for name in names(found) if (problem := problem_of(name))] == []


@PAGES
def test_what_looks_like_a_key_is_in_backticks_and_is_one(found: Page) -> None:
    sections = "|".join({key.section for key in keys().values()} - {""})
    outside = re.sub(r"`[^`]+`", "", prose(found))
    assert re.findall(rf"\b(?:{sections})\.[a-z_]+\b", outside) == []
    dotted = [w for n in names(found) for w in re.findall(rf"(?<![.\w])(?:{sections})\.\w+", n)]
    assert [w for w in dotted if w not in keys()] == []


def test_numbers_on_the_pages_are_those_of_the_code() -> None:
    import torch

    tolerance = reference.TOLERANCE_NATS
    assert f"{tolerance[torch.float32]} nats in float32" in CODES["UW107"].found_by
    assert f"{tolerance[torch.bfloat16]} in bfloat16" in CODES["UW107"].found_by
    assert f"{tolerance[torch.bfloat16] / 20} nats a token" in CODES["UW101"].found_by
    assert f"{tolerance[torch.bfloat16] / 10} a nat" in CODES["UW101"].found_by
    assert agreement.SURE == 4 and "four standard errors" in CODES["UW101"].found_by
    num = inspect.signature(reference.verify).parameters["num"].default
    assert f"{num} rows" in CODES["UW107"].found_by
    assert f"{proof.TOLERANCE_NATS[torch.float32]} nats" in CODES["UW301"].guarded_by
    assert f"{proof.TOLERANCE_NATS[torch.float32]} nats" in CODES["UW401"].found_by
    assert f"{proof.TOLERANCE_NATS[torch.bfloat16]} nats" in CODES["UW401"].found_by
    assert verdict._NOTEWORTHY_FALL_NATS == 0.5 and "half a nat" in CODES["UW304"].guarded_by
    assert curves.ALIKE == 0.8 and "four fifths" in CODES["UW304"].found_by
    assert FEWEST == 6 and "over six held-out" in CODES["UW304"].found_by
    assert Watch().displaced == 0.5 and "-0.5 = 0.61" in CODES["UW304"].found_by
    assert RECENT == 8 and "last eight" in CODES["UW304"].found_by + CODES["UW306"].found_by
    assert Watch().known == 0.9 and "0.9 or more" in CODES["UW306"].found_by
    assert f"run of {curves.FEWEST_STEPS} steps or more" in CODES["UW307"].found_by
    assert orders.FEWEST_ROWS == 10 and "fewer than ten rows" in CODES["UW309"].found_by
    assert f"{verdict._NOTEWORTHY_LENGTH} times" in CODES["UW305"].guarded_by
    assert f"{100 * verdict._NOTEWORTHY_DROPS:.0f} %" in CODES["UW205"].guarded_by
    assert f"`loss.beta` is {keys()['loss.beta'].default}" in CODES["UW307"].guarded_by


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("UW10", "UW101"),
        ("UW213", "UW212"),
        ("UW110", "UW109"),
        ("UW-304", "UW304"),
    ],
)
def test_the_nearest_code_is_of_the_same_family(typed: str, meant: str) -> None:
    with pytest.raises(UpweightError, match=rf"Did you mean {meant}\?"):
        page(typed)


def test_a_code_is_found_in_any_case_and_by_its_number() -> None:
    assert page("uw107") is page(" UW107 ") is page("107") is CODES["UW107"]


def test_an_unknown_code_is_answered_by_the_nearest_and_the_list() -> None:
    with pytest.raises(UpweightError, match=r"^uw10l is not .* code\. Did you mean UW101\? The"):
        page("uw10l")
    with pytest.raises(UpweightError, match=r"hello .* code\. The codes are: UW101, .*, UW402\.$"):
        page("hello")


@PAGES
def test_text_fits_its_width_and_has_no_markup(found: Page) -> None:
    text = as_text(found, width=72)
    assert text.startswith(f"{found.code}  {found.title}\n")
    assert "`" not in text
    assert all(len(line) <= 72 for line in text.splitlines()[1:])
    flat, words = " ".join(text.split()), found.meaning.replace("`", "").split()
    assert " ".join(words) in flat


@PAGES
def test_only_a_page_without_a_detector_says_how_to_look_by_hand(found: Page) -> None:
    said = "upweight does not detect this yet; how to look for it by hand:"
    assert (said in " ".join(as_text(found).split())) == (not found.detected)
    assert (said in as_markdown(found)) == (not found.detected)
    assert ("Once detected, it " in as_text(found)) == (not found.detected)


def test_the_severity_says_what_happens_to_the_run() -> None:
    assert effect(CODES["UW107"]) == "stops the run"
    assert effect(CODES["UW304"]) == "warns, and the run goes on"


def test_a_code_that_refuses_and_of_some_cases_only_warns_says_both() -> None:
    said = " ".join(as_text(CODES["UW103"]).split())
    assert "Stops the run. Only warns of a plan whose learning rates" in said
    assert effect(CODES["UW103"]) == "stops the run, or warns"
    warned = {code for code, found in CODES.items() if found.warns_of}
    assert warned == {"UW101", "UW103", "UW208", "UW209", *(f"UW20{i}" for i in range(1, 5))}


def test_markdown_links_papers_and_other_codes() -> None:
    written = as_markdown(CODES["UW304"])
    assert written.startswith("### UW304\n")
    assert "[arXiv:2402.13228](https://arxiv.org/abs/2402.13228)" in written
    assert "([UW212](#uw212))" in written


def test_the_document_has_every_code_in_its_index_and_as_a_section() -> None:
    document = list_as_markdown(FAMILIES)
    assert re.findall(r"^\| \[(UW\d+)\]", document, re.MULTILINE) == EXPECTED
    assert re.findall(r"^### (UW\d+)$", document, re.MULTILINE) == EXPECTED


def test_the_list_has_every_code_with_its_title() -> None:
    lines = list_as_text(FAMILIES).splitlines()
    assert [line for line in lines if CODE.match(line.strip())] == [
        f"  {p.code}  {p.title}" for p in CODES.values()
    ]


def test_docs_are_what_write_docs_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "write_docs"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("codes.md", "check.md"):
        written = (tmp_path / name).read_text(encoding="utf-8")
        kept = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == kept, f"docs/{name} is old; run .venv/bin/python scripts/write_docs"


def test_explain_prints_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "uw303"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("UW303  ") and "What to do" in printed.out
    assert printed.err == ""


def test_explain_without_a_code_prints_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain"]) == 0
    assert capsys.readouterr().out == list_as_text(FAMILIES) + "\n"


def test_explain_of_an_unknown_code_ends_in_one_message_and_exit_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["explain", "UW10"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: UW10 is not a diagnosis code. Did you mean UW101?")
    assert printed.out == ""


def test_explain_into_a_pipe_is_plain_text_and_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from upweight.cli import main\n"
        "status = main(['explain', 'UW101'])\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("UW101  ") and "\x1b" not in done.stdout
