"""The types that an option of a dataset, loss, projection or benchmark may be annotated with: plain ones, and these with a range."""

from typing import Annotated, Any, Literal

from pydantic import Field

__all__ = ["Annotated", "Any", "Count", "Field", "Literal", "Number", "Pair", "Positive", "Share"]

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
