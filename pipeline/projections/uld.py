from typing import ClassVar

import numpy as np

from pipeline.signals.projection import REST, Form, Meeting, Shares, at_meetings
from pipeline.signals.vocabulary import Vocabulary


def uld(teacher: Vocabulary) -> "Ranks":
    """No map at all: each kept token stays a token of its own that no student token is. For the loss `uld`, which compares sorted values."""
    return Ranks(np.full(len(teacher), REST, dtype=np.int32))


class Ranks:
    form: ClassVar[Form] = "ranks"

    def __init__(self, student_id: np.ndarray) -> None:
        self.student_id = student_id

    def shares(self, meeting: Meeting) -> Shares:
        owner, kept = meeting.kept(meeting.row)
        return at_meetings(meeting, owner, kept, (kept - meeting.first[meeting.row][owner]).astype(np.int32), None)
