from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.options import Count, Share
from pipeline.projections.first_token import first_token
from pipeline.signals.counts import Counts, Matrix
from pipeline.signals.first_tokens import Encode
from pipeline.signals.projection import Form, Meeting, Shares, at_meetings
from pipeline.signals.vocabulary import Vocabulary


def count_transport(teacher: Vocabulary, student: Vocabulary, encode: Encode, counts: Counts, *, least_count: Count = 5, least_share: Share = 0.001) -> "CountTransport":
    """Each token's mass is shared out as often as each student token stood where it stood in the records.

    The maximum-likelihood estimate of one fixed matrix, smoothed by one event of `first_token`; that alone for tokens seen
    fewer than least_count times, whose records would otherwise speak of themselves. Shares below least_share go to the rest.
    """
    matrix = counts.matrix(first_token(teacher, student, encode).student_id, least_count, least_share)
    return CountTransport(matrix.largest()[0], matrix)


@dataclass(frozen=True)
class CountTransport:
    form: ClassVar[Form] = "shares"
    student_id: np.ndarray  # int32 [V_teacher]
    matrix: Matrix

    def shares(self, meeting: Meeting) -> Shares:
        owner, kept = meeting.kept(meeting.row)
        which, share = self.matrix.of(meeting.targets.ids[kept])
        return at_meetings(meeting, owner[which], kept[which], self.matrix.student_id[share], self.matrix.log_share[share])
