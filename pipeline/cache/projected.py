"""A cache as a student reads it: the student's tokens, and the teacher's word at its positions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.cache.reader import Cache, Example, read_table
from pipeline.errors import InputError, Mismatch
from pipeline.signals.projection import Projected, Projection, project
from pipeline.signals.records import Record, Tokens

PROJECTION = pa.schema([("student_id", pa.int32())])


@dataclass(frozen=True)
class Fitted:
    """What fit-projection left: the projection and what it belongs to."""

    projection: Projection
    method: str
    vocabulary: str
    """The digest of the teacher's vocabulary that it was made for."""


def read_projection(path: Path) -> Fitted:
    table = read_table(path, PROJECTION)
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    projection = Projection(table["student_id"].to_numpy(), realised_path=about["realised_path"] == "True")
    return Fitted(projection, about["method"], about["vocabulary"])


class StudentView:
    """Examples of a cache for one student. `render` gives the student's tokens of a record.

    rendering: what it does, in a digest. Where it does what the teacher's tokenizer did, the cache's own tokens are taken.
    """

    def __init__(self, cache: Cache, fitted: Fitted, render: Callable[[Record], Tokens], rendering: str = "") -> None:
        if fitted.vocabulary != cache.about["vocabulary"]:
            raise Mismatch(
                "This projection was fitted for another teacher vocabulary than that of this cache. Run `pipeline fit-projection` on this cache, or give the folders of one experiment with --use."
            )
        if cache.about["text"] != "keep" and fitted.method != "identity":
            raise InputError(
                "This cache was made with `targets.text: omit`, so a student with another tokenizer cannot read its records. "
                "Choose a student with the teacher's tokenizer, or make the cache with `text: keep`."
            )
        self.cache = cache
        self._projection = fitted.projection
        self._render = render
        self._alike = rendering == cache.about["rendering"] or cache.about["text"] != "keep"
        self._vocabulary_size = int(cache.about["vocabulary_size"])

    def tokens(self, example: Example) -> Tokens:
        return example.tokens if self._alike else self._render(example.record)

    def projected(self, example: Example, tokens: Tokens) -> Projected:
        return project(self._projection, example.targets, self.cache.temperatures, self._vocabulary_size, example.tokens, tokens)
