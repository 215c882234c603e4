"""The README.md of a model folder, from a real run and by itself."""

import re
from datetime import UTC, date, datetime
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
    # Every export is called model: what is in its run's folder says which.
    assert f"An adapter (LoRA) of `{tmp_path.name}/model`, made by upweight" in text
    assert "| data | pairs.jsonl |" in text and "| steps | 2 |" in text
    assert str(tmp_path.parent) not in text and "More Information Needed" not in text
    # No reward: DPO has none.
    assert "| date in the prompts |" not in text
    assert "| reward |" not in text and "| beta | 0.1 |" in text


def test_a_model_of_a_hub_names_it_and_a_reward_model_has_a_class_of_its_own():
    values = {"model": "some/base", "data": "pairs.jsonl", "out": "run", "objective": "reward"}
    run = load_run(None, values=values | {"learning_rate": 1e-5}).run
    text = card(Path("run/model"), run, 1234, "2024-07-05")
    assert fields(text)["base_model"] == "some/base"
    assert "AutoModelForSequenceClassification.from_pretrained" in text and "| beta |" not in text
    made = re.search(r"Trained from `some/base`, made by upweight \S+ on (\S+)\.\n", text)
    assert made and date.fromisoformat(made[1]) <= datetime.now(UTC).date()
    assert "| date in the prompts | 2024-07-05 |" in text
    assert "| steps | 1,234 |" in text
    assert "check --model" not in text


def test_bars_in_names_do_not_break_the_table():
    values = {"model": "model", "data": "a|b.jsonl", "out": "run", "learning_rate": 1e-5}
    run = load_run(None, values=values).run
    assert "| data | a\\|b.jsonl |" in card(Path("run/model"), run, 1)
