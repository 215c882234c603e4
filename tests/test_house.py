"""What the README says is there, and nothing of the machine it was written on is."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import upweight.losses.pair as pair_losses
from tiny import save_tiny
from upweight.config import load_stages, require_read
from upweight.config.methods import load_comparison
from upweight.losses import PAIR_LOSSES, PairLogps

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(r"arXiv:\d{4}\.\d{4,5}")
FOREIGN_PATH = re.compile(r"(?<![\w.~-])/(?:work|root)\b")


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for name, body in BLOCK.findall(text) if name == language]


def paths_of(tree: str) -> list[Path]:
    """The paths of an indented tree, two spaces a level; what follows the name is its note."""
    at: list[str] = []
    found: list[Path] = []
    for line in tree.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        at = [*at[:level], line.split()[0]]
        found.append(ROOT.joinpath(*at))
    return found


def test_each_yaml_block_of_the_readme_is_a_run_or_a_comparison_of_some(tmp_path: Path) -> None:
    written = blocks("yaml")
    compared = [text for text in written if "methods:" in text]
    assert len(written) > len(compared) == 1
    for text in written:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        if text in compared:
            comparison = load_comparison(file, {})
            runs = [comparison.run_of(method, tmp_path) for method in comparison.methods]
        else:
            runs = load_stages(file, required=("out",))
        for resolved in runs:
            require_read("train", resolved.run)


def test_the_python_block_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny("my-model")
    pairs = [{"prompt": f"{i}?", "chosen": "yes " * i, "rejected": f"no {i}"} for i in range(1, 5)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    verbs, _ = blocks("python")
    exec(verbs, {})
    assert Path("runs/a/report.html").is_file()
    for name, num in (("scores.jsonl", 4), ("answers.jsonl", 1)):
        assert len(Path(name).read_text().splitlines()) == num


def test_the_loss_that_the_readme_adds_is_its_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    _, block = blocks("python")
    monkeypatch.setattr("upweight.losses.pair.hinge", None, raising=False)
    exec(block, vars(pair_losses))
    hinge = pair_losses.hinge
    assert SOURCE.search(inspect.getdoc(hinge) or "")
    margins, zero = torch.tensor([0.0, 4.0, 10.0, 99.0, -20.0]), torch.zeros(5)
    tokens = torch.ones(5, dtype=torch.long)
    got = hinge(PairLogps(margins, zero, zero, zero, tokens, tokens), beta=0.1)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.6, 0.0, 0.0, 3.0]))


def test_the_tree_of_the_readme_names_only_what_exists() -> None:
    (tree,) = blocks("text")
    assert [path for path in paths_of(tree) if not path.exists()] == []


def test_the_tree_of_the_readme_leaves_out_no_wing_and_no_file_of_one() -> None:
    (tree,) = blocks("text")
    house = ROOT / "src" / "upweight"
    files = {f for f in (*house.glob("*.py"), *house.glob("*/*.py")) if f.name != "__init__.py"}
    wings = {f.parent for f in house.glob("*/__init__.py")}
    assert (files | wings) - set(paths_of(tree)) == set()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_pair_loss_names_its_source(name: str) -> None:
    assert SOURCE.search(inspect.getdoc(PAIR_LOSSES[name]) or "")


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so which files belong to the project is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    texts = {f: f.read_text(encoding="utf-8", errors="ignore") for f in files if f.is_file()}
    assert [str(f) for f, text in texts.items() if FOREIGN_PATH.search(text)] == []


def test_a_tensor_of_another_shape_or_type_than_its_name_says_is_an_error_in_tests() -> None:
    assert pair_losses.probably_flipped(0.1, torch.zeros(3)) is not None
    for wrong in (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(TypeCheckError, match="flipped"):
            pair_losses.probably_flipped(0.1, wrong)
