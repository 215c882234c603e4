"""Sampled responses -> rewards: functions of a table, of a user's own file, or behind HTTP.

To add one: write the function `(prompt, response, row) -> float` and its line in REWARDS. Every
reward is a finite number or the run ends: a response without a reward is never counted as 0.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from upweight.errors import RewardError, nearest
from upweight.types import RowId
from upweight.web import ADDRESSES, NoAnswer, names_host, post

Row = Mapping[str, Any]
Reward = Callable[[str, str, Row], float]
Unchecked = Callable[[str, str, Row], object]
"""A user's function: what it returns is not known to be a number."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A response to score, with its prompt as text (of a conversation the last message before it)
    and the row of the data that it answers."""

    prompt: str
    response: str
    row: Row
    id: RowId


Scorer = Callable[[Sequence[Sampled]], list[float]]


def in_folder(spec: str) -> bool:
    """Whether `spec` is a model's folder: a name of the table stays one beside a folder called so,
    which "./NAME" means."""
    return spec not in REWARDS and Path(spec).is_dir()


def score_responses(spec: str, items: Sequence[Sampled]) -> list[float]:
    """One finite reward per item, in their order. `open_reward` says what `spec` can be."""
    return open_reward(spec)(items)


def open_reward(spec: str, *, timeout_seconds: float = 60.0, batch_size: int = 64) -> Scorer:
    """A name in REWARDS, a user's "path/to/file.py:function", or "http://..." of an endpoint.

    Of a conversation `prompt` is the last message before the response alone: the whole of it stands
    in the row. The file is run when it is opened, once. An endpoint gets POST {"items": [{"prompt",
    "response", "row"}, ...]}, at most `batch_size` at a time, what JSON has no form for as its
    text, and answers {"rewards": [...]} in that order. Raises RewardError, here for a spec that
    is not one of these, and when scoring for a reward that fails or is no finite number.
    """
    if spec in REWARDS:
        return partial(_score_each, spec, REWARDS[spec])
    if spec.startswith(ADDRESSES):
        if not names_host(spec):
            raise RewardError(f'the reward "{spec}" names no host. Write http://host:port/path.')
        return partial(_score_remotely, spec, timeout_seconds, batch_size)
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return partial(_score_each, spec, _own_function(spec, Path(file), function))
    raise RewardError(
        f'"{spec}" is not a reward. It can be: {", ".join(REWARDS)}, a function of your own as '
        f"path/to/file.py:function, http://host:port/path, or the folder of a reward "
        f"model.{nearest(spec, REWARDS)}"
    )


def _score_each(spec: str, reward: Unchecked, items: Sequence[Sampled]) -> list[float]:
    return [_number_of(spec, _call(spec, reward, item), item) for item in items]


def _call(spec: str, reward: Unchecked, item: Sampled) -> object:
    try:
        return reward(item.prompt, item.response, item.row)
    except RewardError as error:
        raise RewardError(f"{item.id}: {error}") from None
    except Exception as error:  # The function is the user's own and may raise anything.
        frames = traceback.extract_tb(error.__traceback__)
        at = (frames[1:] or frames)[0]
        raise RewardError(
            f'{item.id}: the reward "{spec}" raised {type(error).__name__}: {error} (line '
            f"{at.lineno} of {at.filename}), on the response {_shown(item.response)}."
        ) from error


def _number_of(spec: str, value: object, item: Sampled) -> float:
    try:
        # A text that reads as a number is still a mistake, and so is None.
        number = math.nan if isinstance(value, str | bytes) else float(value)  # pyright: ignore
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f'{item.id}: the reward "{spec}" gave {_shown(value)} for the response '
            f"{_shown(item.response)}. A reward is one finite number."
        )
    return number


def _shown(value: object, longest: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _own_function(spec: str, file: Path, name: str) -> Unchecked:
    """The function that the user named; their file is run to get it."""
    if not file.is_file():
        raise RewardError(f'the reward "{spec}" is in {file}, which is not a file.')
    module_spec = importlib.util.spec_from_file_location(f"upweight_reward_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickle look their module up by its name.
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # The file is the user's own and may raise anything.
        raise RewardError(
            f'the reward "{spec}": {file} cannot be run: {type(error).__name__}: {error}.'
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [
            found
            for found, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise RewardError(
            f'the reward "{spec}": {file} has no function {name} (it has: '
            f"{', '.join(there) or 'none'}).{nearest(name, there)}"
        )
    try:
        inspect.signature(function).bind("prompt", "response", {})
    except TypeError:
        raise RewardError(
            f'the reward "{spec}" is {name}{inspect.signature(function)}, and is called as '
            f"{name}(prompt, response, row)."
        ) from None
    return function


def _score_remotely(
    url: str, timeout_seconds: float, batch_size: int, items: Sequence[Sampled]
) -> list[float]:
    found: list[float] = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        rewards = _posted(url, timeout_seconds, batch)
        if len(rewards) != len(batch):
            raise RewardError(
                f"{url} gave {len(rewards)} rewards for {len(batch)} responses "
                f"({batch[0].id} to {batch[-1].id}). It has to give one for each, in order."
            )
        found += [_number_of(url, r, item) for r, item in zip(rewards, batch, strict=True)]
    return found


def _posted(url: str, timeout_seconds: float, batch: Sequence[Sampled]) -> list[object]:
    items = [{"prompt": i.prompt, "response": i.response, "row": i.row} for i in batch]
    try:
        body = post(url, {"items": _as_json(items)}, timeout_seconds)
    except NoAnswer as error:
        raise RewardError(f"{url}, asked for rewards of {len(batch)} responses, {error}.") from None
    try:
        rewards = json.loads(body)["rewards"]
    except (ValueError, TypeError, KeyError):
        rewards = None
    if not isinstance(rewards, list):
        raise RewardError(
            f'{url} answered {_shown(body, 200)}, which is not {{"rewards": [...]}} in JSON.'
        )
    return rewards


def _as_json(value: Any) -> Any:
    """`value` with a text in the place of what JSON has no form for, as nan, infinity and dates."""
    match value:
        case Mapping():
            return {str(key): _as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_as_json(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


def vader(prompt: str, response: str, row: Row) -> float:
    """VADER's compound sentiment of the response, -1 to 1 (Hutto and Gilbert 2014)."""
    return float(_analyzer().polarity_scores(response)["compound"])


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise RewardError(
            f'the reward "vader" needs vaderSentiment, which cannot be imported ({error}). '
            "Run: pip install vaderSentiment==3.3.2"
        ) from None
    return SentimentIntensityAnalyzer()


def number(prompt: str, response: str, row: Row) -> float:
    """1 where the response's final number is that of the row's `answer`, else 0.

    For gsm8k and the like: `final_number` says what the final number is. Compared exactly: 0.5
    is 1/2 and 42.00 is 42, but 0.33 is not 1/3.
    """
    answer = _answer(row)
    wanted = final_number(answer)
    if wanted is None:
        raise RewardError(f'the row\'s "answer" has no number: {_shown(answer)}.')
    return float(final_number(response) == wanted)


def contains(prompt: str, response: str, row: Row) -> float:
    """1 where the row's `answer` is in the response, whatever its upper and lower case, else 0.

    As text, so that 4 is in 42: for numbers use `number`.
    """
    answer = _answer(row).strip()
    if not answer:
        raise RewardError('the row\'s "answer" is empty, which every response contains.')
    return float(answer.casefold() in response.casefold())


def _answer(row: Row) -> str:
    if row.get("answer") is None:
        raise RewardError(
            f'the row has no "answer" to compare with (it has: {", ".join(row) or "nothing"}).'
        )
    return str(row["answer"])


# A minus that follows a word or a number subtracts, as in 16-3, and one before a space is a dash;
# a comma belongs to a number only before exactly three digits; a fraction has a denominator that is
# not 0.
_NUMBER = (
    r"(?P<minus>(?<![\w.)\]])[-\u2212](?=\$|\.?[0-9]))?\$?\s?"
    r"(?P<size>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:/(?P<below>0*[1-9][0-9]*)(?![0-9]|\.[0-9]))?"
)
_ANYWHERE = re.compile(_NUMBER)
_MARKED = re.compile(rf"####\s*{_NUMBER}[^\w\n]*$", re.MULTILINE)
_MOST_DIGITS = 1000


def final_number(text: str) -> Fraction | None:
    """The number on the last line "#### 42", or else the last number of the text; None without.

    Thousands may have commas, a currency sign and a final dot do not matter, and a/b is a
    fraction; a dash with a space behind it is no minus. "#### Step 2" is a heading and no answer.
    More than 1000 digits are no number.
    """
    found = list(_MARKED.finditer(text)) or list(_ANYWHERE.finditer(text))
    if not found or found[-1].end() - found[-1].start() > _MOST_DIGITS:
        return None
    last = found[-1]
    size = Fraction(last["size"].replace(",", "")) / int(last["below"] or 1)
    return -size if last["minus"] else size


REWARDS: dict[str, Reward] = {
    "vader": vader,
    "number": number,
    "contains": contains,
}
"""(prompt, response, row) -> reward. The row is that of the prompts' data, all its columns."""

COLUMNS: dict[str, tuple[str, ...]] = {"vader": (), "number": ("answer",), "contains": ("answer",)}
"""The columns of a row that each of them reads. A function of the user's may read any."""
