"""Which student token begins at a byte when the text from there on is another than it was.

A teacher's token stands for bytes; what the student would read there depends on the text before it (` the` after a word, but
not after a space), and is found by asking the student's own tokenizer, once for each pair of text before and bytes.
"""

from collections.abc import Callable, Iterable
from itertools import compress

import numpy as np

from pipeline.errors import InputError
from pipeline.signals.vocabulary import Vocabulary

LONGEST = 32
"""Bytes of the text before that are looked at, at most."""
MOST = 1_000_000
"""Answers that are remembered at a time, at most."""
NONE = -1
"""No token begins there: the student would read bytes before and after it as one token."""

Encode = Callable[[list[str]], list[list[int]]]


class FirstTokens:
    """An answer is an int: NONE, or 2 * (the student's token) + (1 if it reaches the end of the bytes, so that more of them could change it)."""

    def __init__(self, student: Vocabulary, encode: Encode) -> None:
        self.safe = _safe_bounds(student)
        """bool [256, 256]: between these two bytes a text can be cut, and both sides keep their tokens."""
        self._student = student
        self._lengths = student.lengths.tolist()
        self._encode = encode
        self._lead, self._added = _lead(student, encode)
        self._known: dict[tuple[bytes, bytes], int] = {}

    def left_of(self, text: bytes, places: np.ndarray, begins: np.ndarray) -> list[bytes]:
        """The text before each place, back to where it can be cut: all that can matter for what begins there.

        places: int64 [n]; begins: int64 [n], how far back to look at most.
        """
        data = np.frombuffer(text, dtype=np.uint8)
        cut = np.ones(len(data) + 1, dtype=bool)
        if len(data):
            cut[1:-1] = self.safe[data[:-1], data[1:]] & ((data[1:] & 0xC0) != 0x80)
        last = np.maximum.accumulate(np.where(cut, np.arange(len(cut)), 0))
        left = []
        for place, begin in zip(places.tolist(), np.maximum(last[np.maximum(places - 1, 0)], begins).tolist(), strict=True):
            at = begin
            while at < place and data[at] & 0xC0 == 0x80:
                at += 1
            left.append(text[at:place])
        return left

    def of(self, pairs: list[tuple[bytes, bytes]]) -> np.ndarray:
        """int64, one answer for each (text before, bytes); the bytes are at least one."""
        known = self._known
        found = [known.get(pair, -2) for pair in pairs]
        if missing := dict.fromkeys(compress(pairs, (answer == -2 for answer in found))):
            if len(known) + len(missing) > MOST:
                known.clear()
            new = dict(zip(missing, self._asked(missing), strict=True))
            known |= new
            found = [new[pair] if answer == -2 else answer for pair, answer in zip(pairs, found, strict=True)]
        return np.array(found, dtype=np.int64)

    def _asked(self, pairs: Iterable[tuple[bytes, bytes]]) -> list[int]:
        texts = [_complete(left + new) for left, new in pairs]
        encoded = self._encode([self._lead + text for text in texts])
        return [self._begins(left, new, len(text.encode()), ids) for (left, new), text, ids in zip(pairs, texts, encoded, strict=True)]

    def _begins(self, left: bytes, new: bytes, size: int, ids: list[int]) -> int:
        if size > len(left):  # otherwise the new bytes are no character yet
            at = -self._added
            for id in ids:
                length = self._lengths[id]
                if not length:  # not of the text: the tokenizer does not know these bytes
                    break
                if at == len(left):
                    return 2 * id + (at + length >= size)
                at += length
                if at > len(left):
                    return NONE
        longest = self._student.longest_prefix(new)
        return NONE if longest is None else 2 * longest + 1


def _complete(data: bytes) -> str:
    """The text that the bytes begin with, up to the first that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _crossed(student: Vocabulary) -> np.ndarray:
    """bool [256, 256]: bytes that some token has side by side."""
    crossed = np.zeros((256, 256), dtype=bool)
    for token in student.token_bytes:
        if len(token) > 1:
            data = np.frombuffer(token, dtype=np.uint8)
            crossed[data[:-1], data[1:]] = True
    return crossed


def _safe_bounds(student: Vocabulary) -> np.ndarray:
    """No token has the two bytes side by side, so none reaches across; and what comes after is split as if it stood alone.

    The second holds before a space, and where a letter or digit is followed by something of another kind: there the splitting
    patterns in use (GPT-2, Llama 3, Qwen) always begin anew. It does not between two marks or two digits, which they take
    together even if no token has both, nor inside a word, which may be a token that no merge makes, nor before a letter's accent.
    """
    kind = np.array([3 if byte >= 128 else 1 if chr(byte).isdigit() else 2 if chr(byte).isalpha() else 0 for byte in range(256)])
    anew = np.isin(kind, (1, 2))[:, None] & (kind < 3)[None] & (kind[:, None] != kind[None])
    anew[:, ord(" ")] = True
    return ~_crossed(student) & anew


def _lead(student: Vocabulary, encode: Encode) -> tuple[str, int]:
    """What to put before a text so that the tokenizer leaves it as it is, and how many bytes come before it then.

    SentencePiece tokenizers may begin with a space of their own.
    """
    crossed = _crossed(student)
    for lead in ("", *(letter for letter in "\n\t\r|" if not crossed[ord(letter)].any())):
        (ids,) = encode([lead + "a"])
        read = b"".join(student.token_bytes[id] for id in ids)
        if read.endswith(lead.encode() + b"a") and (lead or len(read) == 1) and student.token_bytes[ids[-1]] == b"a":
            return lead, len(read) - 1
    raise InputError("The student's tokenizer adds to what it reads, so it cannot be asked for single tokens. Choose another projection.method than contextual.")
