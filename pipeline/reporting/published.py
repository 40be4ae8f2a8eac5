"""Figures that others have published, to stand beside ours, marked as theirs."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DamageError, InputError
from pipeline.files import read_json

SHAPE = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Figure(BaseModel):
    """What each of their models reached, in our units: shares, not per cent."""

    model_config = SHAPE
    teacher: float
    student: float
    baseline: float | None = None
    retention: float | None = None
    """As they give it, whatever they divided by what."""


class Named(BaseModel):
    """Which models these were."""

    model_config = SHAPE
    teacher: str = Field(min_length=1)
    student: str = Field(min_length=1)
    baseline: str | None = None


class Published(BaseModel):
    model_config = SHAPE
    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    models: Named
    figures: dict[str, Figure] = Field(min_length=1)
    """By our name of the task (mmlu_anatomy), or of a figure of the held-out texts (rouge1)."""
    cost: dict[str, Figure] = {}
    notes: list[str] = []
    """What a reader has to know of them."""


def published(path: Path | str) -> dict[str, Any]:
    """Somebody's published figures: name, source, models, figures, cost and notes. InputError says what in the file is wrong.

    figures[task or figure] and cost[what] hold teacher, student, baseline and retention; the last two are None where they gave none.
    """
    shown = "configs/distilllm_med/published.json shows how such a file looks."
    try:
        found = read_json(Path(path), links=True)
    except OSError as error:
        raise InputError(f"The published figures {path} cannot be read: {error.strerror}. {shown}") from None
    except DamageError as error:
        raise InputError(f"The published figures {path} are no JSON: {error.__context__}. {shown}") from None
    try:
        return Published.model_validate(found).model_dump()
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']} (it is {str(problem['input'])[:60]!r})" for problem in error.errors()]
        raise InputError("\n".join([*problems, shown])) from None
