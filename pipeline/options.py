"""The types that an option of a dataset, loss, projection or benchmark may be annotated with: plain ones, and these with a range."""

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import Field

__all__ = ["Annotated", "Any", "Commit", "Count", "Field", "Fields", "Literal", "Number", "Optional", "Pair", "Positive", "Rate", "Share", "Union"]

MOST = 2**63 - 1
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Number = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1000)]
"""Of learning."""
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
"""Of a repository on the hub, 40 hexadecimal digits."""
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
Fields = dict[str, str | list[str] | None]
"""A record's fields -> names in a file."""
