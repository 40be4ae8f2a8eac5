from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.options import Count, Share
from pipeline.signals.counts import Counts, Matrix
from pipeline.signals.first_tokens import LONGEST, NONE, Encode, FirstTokens
from pipeline.signals.projection import REST, Form, Meeting, Shares
from pipeline.signals.records import ANSWER, END, number_as_lead
from pipeline.signals.vocabulary import Vocabulary

EXCLUDED = -2
"""Where the mass goes that the student cannot read as beginning there: nowhere, it is no part of the target."""
NOTHING = 256
"""Instead of a byte: there is none before."""


def contextual(
    teacher: Vocabulary, student: Vocabulary, encode: Encode, counts: Counts, *, depth: Count = 4, inside: bool = True, least_mass: Share = 0.05, least_count: Count = 5, least_share: Share = 0.01
) -> "Contextual":
    """A token's mass goes to the student token that begins there when the text goes on with its bytes, given the text before.

    Where that token could still grow (`1` of `123`), the text that is there is followed, with what the teacher says at each of
    its next tokens, `depth` at most; for what is not there, it is shared out as in `count_transport`. What the student would
    read as one with the text before is left out, for the student does begin a token here. inside: also where its token begins
    inside a teacher's token, from the tokens that go on with the same bytes, if these have least_mass at least.
    """
    first = FirstTokens(student, encode)
    plain = np.array([bool(token) for token in teacher.token_bytes])
    alone = np.full(len(teacher), NONE, dtype=np.int64)
    alone[plain] = first.of([(b"", token) for token in teacher.token_bytes if token])
    student_id = np.where(alone == NONE, REST, alone >> 1).astype(np.int32)
    for end in teacher.end_ids:
        student_id[end] = student.end_ids[0] if student.end_ids else REST
    first_byte = np.array([token[0] if token else 0 for token in teacher.token_bytes], dtype=np.uint8)
    safe = np.concatenate([first.safe, np.ones((1, 256), dtype=bool)])
    matrix = counts.matrix(np.where(plain, student_id, REST), least_count, least_share)
    return Contextual(student_id, teacher.token_bytes, plain, first_byte, first, safe, alone, matrix, matrix.largest()[1], depth, inside, least_mass)


@dataclass(frozen=True)
class Contextual:
    form: ClassVar[Form] = "shares"
    student_id: np.ndarray  # int32 [V_teacher] with nothing before
    token_bytes: list[bytes]  # [V_teacher]
    plain: np.ndarray  # bool [V_teacher] which have bytes
    first_byte: np.ndarray  # uint8 [V_teacher]
    first: FirstTokens
    safe: np.ndarray  # bool [257, 256] as first.safe; the last row: nothing before
    alone: np.ndarray  # int64 [V_teacher] what `first` answers with nothing before
    matrix: Matrix
    largest: np.ndarray  # float64 [V_teacher] the largest share of each
    depth: int
    inside: bool
    least_mass: float

    def shares(self, meeting: Meeting) -> Shares:
        places = _places(meeting, self.token_bytes, self.inside)
        found, nodes = self._begin(meeting, places, self._left(meeting, places))
        parts = [found]
        for depth in range(self.depth):
            if not len(nodes.row):
                break
            found, nodes = self._follow(meeting, places, nodes, grows=depth + 1 < self.depth)
            parts.append(found)
        root, entry, to, log_share, usual = _together(parts)
        logprobs = meeting.targets.logprobs[entry]
        mass = np.exp(logprobs + log_share)
        total = np.bincount(root, mass, len(places.row)).astype(np.float64)
        inside = np.array([bool(read) for read in places.read], dtype=bool)
        to = np.where((inside & (total < self.least_mass))[root], REST, to)
        unkept = np.exp(meeting.targets.rests[0, places.row])
        # neither what was shared out by counts nor what was left out is known to be right, and inside a token all that is not kept might go on so
        whole = np.where(inside, total, meeting.mass[places.row]) + unkept
        total += np.where(inside, 0.0, unkept)
        reliability = (total - np.bincount(root, mass * usual, len(places.row))) / np.maximum(whole, 1e-30)
        reliability = np.clip(reliability, 0.0, 1.0)
        return Shares(places.position, places.row, inside, reliability.astype(np.float32), root, entry, to.astype(np.int32), log_share.astype(np.float32))

    def _left(self, meeting: Meeting, places: "_Places") -> list[bytes]:
        """The text before each place as far as it matters, with the template's bytes that the answer's first token begins with."""
        starts = meeting.student.start
        begins = np.maximum(starts[places.answer], starts[np.searchsorted(meeting.student.end, places.byte - LONGEST, side="left")]).astype(np.int64)
        # a number may be taken three digits at a time, so it is looked at from its beginning
        data = np.frombuffer(meeting.content + b" ", dtype=np.uint8)
        digit = (data >= ord("0")) & (data <= ord("9"))
        number = np.maximum.accumulate(np.where(digit & ~np.append(False, digit[:-1]), np.arange(len(data)), 0))
        begins = np.where(digit[begins], np.maximum(number[begins], starts[places.answer]), begins)
        left = self.first.left_of(meeting.content, places.byte, np.minimum(begins, places.byte))
        whole = places.byte - meeting.student.start[places.answer]
        leads = meeting.student.lead[places.answer]
        return [number_as_lead(lead) + text if lead and text and len(text) == size else text for text, size, lead in zip(left, whole.tolist(), leads.tolist(), strict=True)]

    def _begin(self, meeting: Meeting, places: "_Places", left: list[bytes]) -> tuple["_Found", "_Nodes"]:
        """Each kept token of each place: where it goes, or that it is to be followed."""
        owner, entry = meeting.kept(places.row)
        ids = meeting.targets.ids[entry]
        plain, outside = self.plain[ids], np.array([not read for read in places.read], dtype=bool)[owner]
        last = np.array([text[-1] if text else NOTHING for text in left], dtype=np.int64)
        at_once = plain & outside & self.safe[last[owner], self.first_byte[ids]]
        answers = np.full(len(ids), NONE, dtype=np.int64)
        answers[at_once] = self.alone[ids[at_once]]
        asked = np.flatnonzero(plain & outside & ~at_once).tolist()
        pairs = [(left[o], self.token_bytes[id]) for o, id in zip(owner[asked].tolist(), ids[asked].tolist(), strict=True)]
        for e in np.flatnonzero(plain & ~outside).tolist():
            read, token = places.read[owner[e]], self.token_bytes[ids[e]]
            if len(token) > len(read) and token.startswith(read):
                asked.append(e)
                pairs.append((left[owner[e]], token[len(read) :]))
        answers[asked] = self.first.of(pairs)

        to = np.where(answers == NONE, EXCLUDED, answers >> 1)
        to[~plain & outside] = self.student_id[ids[~plain & outside]]
        realised = ids == meeting.realised[places.row][owner]
        open = (answers == NONE) | (answers & 1 == 1)
        # more bytes may change a token even if it does not reach the end of those that are known
        unlike = answers >> 1 != places.token[owner]
        growing = realised & plain & (open | unlike) & meeting.goes_on[places.row][owner] & (self.depth > 0)
        root = owner[growing]
        read = [self.token_bytes[id][len(places.read[o]) :] for o, id in zip(root.tolist(), ids[growing].tolist(), strict=True)]
        nodes = self._nodes(root, entry[growing], places.row[root] + 1, [left[o] for o in root.tolist()], read, answers[growing], np.zeros(len(root)))

        # what could grow and is not there: as often as each token stood there
        usual = ~growing & ~realised & plain & outside & open & (answers == self.alone[ids]) & (answers != NONE)
        which, share = self.matrix.of(ids[usual])
        taken = ~growing & ~usual & (to != EXCLUDED)
        return _Found(
            root=np.concatenate([owner[taken], owner[usual][which]]),
            entry=np.concatenate([entry[taken], entry[usual][which]]),
            to=np.concatenate([to[taken], self.matrix.student_id[share]]),
            log_share=np.concatenate([np.zeros(int(taken.sum())), self.matrix.log_share[share]]),
            usual=np.concatenate([np.zeros(int(taken.sum())), 1 - self.largest[ids[usual][which]]]),
        ), nodes

    def _follow(self, meeting: Meeting, places: "_Places", nodes: "_Nodes", grows: bool) -> tuple["_Found", "_Nodes"]:
        """One token further along the text: the kept tokens of each node's row close what was read before, or are read with it.

        What is not kept there is taken to be as the kept tokens that are not there.
        """
        owner, kept = meeting.kept(nodes.row)
        ids = meeting.targets.ids[kept]
        shares, left_over = meeting.shares
        with np.errstate(divide="ignore"):
            log_share = nodes.log_share[owner] + np.log(shares[kept])
            log_rest = nodes.log_share + np.log(left_over[nodes.row])
        plain = self.plain[ids]
        last = np.array([read[-1] for read in nodes.read], dtype=np.int64)
        closes = ~plain | self.safe[last[owner], self.first_byte[ids]]
        answers = np.where(nodes.answer == NONE, NONE, nodes.answer & ~1)[owner]
        asked = np.flatnonzero(~closes)
        answers[asked] = self.first.of([(nodes.left[o], nodes.read[o] + self.token_bytes[id]) for o, id in zip(owner[asked].tolist(), ids[asked].tolist(), strict=True)])
        to = np.where(answers == NONE, EXCLUDED, answers >> 1)
        to[~plain & (self.student_id[ids] == REST)] = REST

        open = (answers == NONE) | (answers & 1 == 1) | (answers >> 1 != places.token[nodes.root][owner])
        growing = (ids == meeting.realised[nodes.row][owner]) & ~closes & open & meeting.goes_on[nodes.row][owner] & grows
        read = [nodes.read[o] + self.token_bytes[id] for o, id in zip(owner[growing].tolist(), ids[growing].tolist(), strict=True)]
        parent = owner[growing]
        further = self._nodes(nodes.root[parent], nodes.entry[parent], nodes.row[parent] + 1, [nodes.left[o] for o in parent.tolist()], read, answers[growing], log_share[growing])
        taken = ~growing & (to != EXCLUDED)
        lost = np.flatnonzero(left_over[nodes.row] > 0)  # nothing else is kept there
        return _Found(
            root=np.concatenate([nodes.root[owner][taken], nodes.root[lost]]),
            entry=np.concatenate([nodes.entry[owner][taken], nodes.entry[lost]]),
            to=np.concatenate([to[taken], np.full(len(lost), REST)]),
            log_share=np.concatenate([log_share[taken], log_rest[lost]]),
            usual=np.zeros(int(taken.sum()) + len(lost)),
        ), further

    def _nodes(self, root: np.ndarray, entry: np.ndarray, row: np.ndarray, left: list[bytes], read: list[bytes], answer: np.ndarray, log_share: np.ndarray) -> "_Nodes":
        matters = [before if before and not self.safe[before[-1], after[0]] else b"" for before, after in zip(left, read, strict=True)]
        return _Nodes(root, entry, row, matters, read, answer, log_share)


@dataclass(frozen=True)
class _Places:
    """Where the student begins a token in an answer and something of the teacher's is to be had."""

    position: np.ndarray  # int64 [n] the student's positions, ascending
    row: np.ndarray  # int64 [n] the described position of the teacher
    byte: np.ndarray  # int64 [n] where in the content
    token: np.ndarray  # int32 [n] the student's token that begins there
    answer: np.ndarray  # int64 [n] the student's first token of the answer
    read: list[bytes]  # the part of the teacher's token that lies before; b"": both begin there


@dataclass(frozen=True)
class _Nodes:
    """Teacher tokens that are there and whose student token could still grow."""

    root: np.ndarray  # int64 [n] of which place
    entry: np.ndarray  # int64 [n] which kept token of that place led here
    row: np.ndarray  # int64 [n] the described position after what was read
    left: list[bytes]  # the text before the place that still matters
    read: list[bytes]  # the bytes since the place
    answer: np.ndarray  # int64 [n] the student's token for these
    log_share: np.ndarray  # float64 [n] of the entry's mass, that came here


@dataclass(frozen=True)
class _Found:
    """Shares of kept tokens' mass."""

    root: np.ndarray  # int64 [m] of which place
    entry: np.ndarray  # int64 [m] of which kept token
    to: np.ndarray  # int64 [m] the student token, or REST
    log_share: np.ndarray  # float64 [m]
    usual: np.ndarray  # float64 [m] the part of it that was shared out by counts alone


def _places(meeting: Meeting, token_bytes: list[bytes], inside: bool) -> _Places:
    teacher, student = meeting.teacher, meeting.student
    position, row, read = meeting.at_student, meeting.row, [b""] * len(meeting.row)
    if inside:
        missing = np.setdiff1d(student.answer_positions(), position)
        missing = missing[(student.kind[missing + 1] != END) & (student.lead[missing + 1] == 0)]
        byte = student.start[missing + 1]
        token = np.searchsorted(teacher.end, byte, side="right")  # the first that ends after it
        token = np.minimum(token, len(teacher) - 1)
        row_of = np.full(len(teacher) + 1, -1)
        row_of[meeting.targets.position + 1] = np.arange(len(meeting.targets.position))
        covers = (teacher.kind[token] == ANSWER) & (teacher.start[token] < byte) & (row_of[token] >= 0)
        missing, byte, token = missing[covers], byte[covers], token[covers]
        lead = [len(number_as_lead(lead)) for lead in teacher.lead[token].tolist()]
        before = [token_bytes[id][: more + size] for id, more, size in zip(teacher.ids[token].tolist(), lead, (byte - teacher.start[token]).tolist(), strict=True)]
        order = np.argsort(np.concatenate([position, missing]), kind="stable")
        position, row = np.concatenate([position, missing])[order], np.concatenate([row, row_of[token]])[order]
        both = read + before
        read = [both[i] for i in order.tolist()]
    begins = np.flatnonzero((student.kind >= ANSWER) & (np.append(-1, student.kind[:-1]) != ANSWER))
    answer = begins[np.searchsorted(begins, position + 1, side="right") - 1]
    return _Places(position, row, student.start[position + 1].astype(np.int64), student.ids[position + 1], answer, read)


def _together(parts: list[_Found]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The shares, those of one entry and one student token summed: root, entry, to, log_share, usual."""
    root, entry, to, log_share, usual = (np.concatenate([getattr(part, name) for part in parts]) for name in ("root", "entry", "to", "log_share", "usual"))
    if len(parts) == 1:
        return root, entry, to, log_share, usual
    span = int(to.max(initial=0)) + 2
    keys = (root * (int(entry.max(initial=0)) + 1) + entry) * span + to + 1
    _, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
    with np.errstate(divide="ignore"):
        return root[index], entry[index], to[index], np.log(np.bincount(inverse, np.exp(log_share), len(index))), usual[index]
