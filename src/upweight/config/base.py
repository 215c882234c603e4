"""What a key can hold, and what a section of keys is."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_nul(value: str) -> str:
    # No file name can hold it, and what is opened by such a name fails late and in other words.
    if "\0" in value:
        raise ValueError("a NUL character")
    return value


def _a_day(value: str) -> str:
    if date.fromisoformat(value).isoformat() != value:
        raise ValueError("a day in another form")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Day = Annotated[str, AfterValidator(_a_day), WithJsonSchema({"type": "string", "format": "date"})]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Texts = Annotated[list[Text], BeforeValidator(_listed), Field(min_length=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Trackers = Annotated[list[Tracker], BeforeValidator(_listed)]


class Section(BaseModel):
    """Keys that belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
