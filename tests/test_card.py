"""The README.md of a model folder, from a real run and by itself."""

from pathlib import Path

import pytest
import yaml

from runs import furnish, train
from upweight.config import load_run
from upweight.recipes.card import card


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def fields(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---")[1])
    return found


def test_an_adapter_says_what_it_is_and_what_it_was_made_of(tmp_path: Path):
    assert train("run", "--lora", "--steps", "2") == 0
    text = Path("run/model/README.md").read_text()
    assert fields(text) == {"library_name": "peft", "tags": ["upweight", "dpo", "lora"]}
    assert "An adapter (LoRA) of model, made by upweight" in text
    assert "| data | pairs.jsonl |" in text and "| steps | 2 |" in text
    assert str(tmp_path) not in text and "More Information Needed" not in text
    # No reward: DPO has none.
    assert "| reward |" not in text and "| beta | 0.1 |" in text


def test_a_model_of_a_hub_names_it_and_a_reward_model_has_a_class_of_its_own():
    values = {"model": "some/base", "data": "pairs.jsonl", "out": "run", "objective": "reward"}
    run = load_run(None, values=values | {"learning_rate": 1e-5}).run
    text = card(Path("run/model"), run, 1234)
    assert fields(text)["base_model"] == "some/base"
    assert "AutoModelForSequenceClassification.from_pretrained" in text and "| beta |" not in text
    assert "Trained from some/base" in text and "| steps | 1,234 |" in text
    assert "check --model" not in text


def test_bars_in_names_do_not_break_the_table():
    values = {"model": "model", "data": "a|b.jsonl", "out": "run", "learning_rate": 1e-5}
    run = load_run(None, values=values).run
    assert "| data | a\\|b.jsonl |" in card(Path("run/model"), run, 1)
