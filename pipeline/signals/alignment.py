"""Where two tokenizers' tokens of one record meet: in byte coordinates of its content, nowhere else."""

import numpy as np

from pipeline.errors import Mismatch
from pipeline.signals.records import ANSWER, END, Tokens


def align(teacher: Tokens, student: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of positions (teacher's, student's), int64 each, whose next tokens begin at the same byte of an answer.

    At such positions both have read the same content and are asked for what comes next. The end of an answer is an event
    of its own, after its last byte. A pair whose tokens begin with different bytes of the templates (" yes" against "yes")
    is no pair. Linear in the number of tokens. Raises Mismatch if the two do not cover equally many bytes.
    """
    if teacher.end[-1] != student.end[-1]:  # all of the content: a first answer token may reach back into the question
        raise Mismatch(f"The tokens cover {teacher.end[-1]} and {student.end[-1]} bytes of the content: they are not of the same record.")
    events_t, tokens_t = _events(teacher)
    events_s, tokens_s = _events(student)
    _, at_t, at_s = np.intersect1d(events_t, events_s, return_indices=True)  # of two empty answers at one byte the first
    tokens_t, tokens_s = tokens_t[at_t], tokens_s[at_s]
    same_lead = teacher.lead[tokens_t] == student.lead[tokens_s]
    return tokens_t[same_lead] - 1, tokens_s[same_lead] - 1


def _events(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Per answer token and answer end that something precedes: a number for where it is, and its index."""
    index = np.flatnonzero(tokens.kind[1:] >= ANSWER) + 1
    # an answer's end stands before a token that begins at the same byte (that of a next answer)
    return 2 * tokens.start[index].astype(np.int64) + (tokens.kind[index] != END), index
