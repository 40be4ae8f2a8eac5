from collections.abc import Callable
from dataclasses import replace

from pipeline.projections.first_token import first_token
from pipeline.signals.projection import Projection
from pipeline.signals.vocabulary import Vocabulary


def contextual(teacher: Vocabulary, student: Vocabulary, encode: Callable[[list[str]], list[list[int]]]) -> Projection:
    """`first_token`, but the realised teacher token is placed by what followed it in the record.

    It goes to the student token that really stands there, with the share of its mass that the teacher's own further
    log-probabilities give to that continuation; the remainder goes to the rest.
    """
    return replace(first_token(teacher, student, encode), realised_path=True)
