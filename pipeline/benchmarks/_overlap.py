"""Which evaluation texts the training records already have: the contamination guard.

The rule is that of GPT-3 (Brown et al. 2020, appendix C, arXiv 2005.14165): a text is seen if 13 words of it in a row stand in the
training texts, whatever their case and punctuation. What a word is in scripts that they did not have to deal with is our choice.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import numpy as np

WORDS = 13
AT_ONCE = 1 << 20
"""Training words that are looked up together."""
UNSPACED = [
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF)),  # Thai, Lao; Myanmar; Khmer; Tai Le, New Tai Lue; Tai Tham
    *((0xA9E0, 0xA9FF), (0xAA60, 0xAADF)),  # Myanmar, Tai Viet
    *((0x3005, 0x3007), (0x3040, 0x30FF), (0x3100, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),  # kana, bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF)),  # Han, kana
]
"""Code points (both ends included) of scripts that put no spaces between words."""
Words = tuple[str, ...]


def seen(texts: Sequence[str], training: Iterable[str], words: int = WORDS) -> list[bool]:
    """Of each text, whether any run of so many of its words stands in one of the training texts.

    training: one string a segment (a question, a context, an answer): no run reaches from one into the next. Where an evaluation
    text joins several segments, give the training records' joined texts, too. A text of fewer words is seen if a training text has
    the same words and no others: so short a run inside a longer text proves nothing. A text without words (empty, only emoji) is
    never seen. In memory are the texts' words (4 bytes each) and distinct runs (16 bytes each); training is gone through once.
    """
    assert words > 0
    numbers: dict[str, int] = {}
    split = [words_of(text) for text in texts]
    numbered = [np.array([numbers.setdefault(word, len(numbers) + 1) for word in found], np.int32) for found in split]
    runs = _Runs(numbered, words)
    short: dict[Words, bool] = {found: False for found in split if 0 < len(found) < words}
    for block in _blocks(training, numbers, short, words):
        runs.look_for(block)
    return [short.get(found, False) if len(found) < words else runs.any_found(text) for text, found in enumerate(split)]


def words_of(text: str) -> Words:
    """The words, so that texts that a reader takes for the same have the same.

    Case and compatibility forms are folded (Unicode's compatibility caseless match, D146: ligatures, full width, superscripts); what
    cannot be seen (soft hyphens, joiners, variation selectors) and what encloses (keycaps) is left out. Every other thing that is
    neither letter nor digit nor a mark on one ends a word. In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
    each letter is a word, so that 13 of them are fewer words than 13 of English: the rule flags more there, not less.
    """
    if text.isascii():
        return tuple(_ASCII.findall(text.lower()))
    unseen, word = _patterns()
    folded = unicodedata.normalize("NFD", unseen.sub("", text)).casefold()
    folded = unicodedata.normalize("NFKD", folded).casefold()
    return tuple(word.findall(unicodedata.normalize("NFKC", folded)))


class _Runs:
    """The distinct runs of words of the evaluation texts, and which of them have been found."""

    def __init__(self, numbered: Sequence[np.ndarray], length: int) -> None:
        self.length = length
        self._words = np.concatenate([np.zeros(0, np.int32), *numbered])
        starts = [np.arange(max(len(found) - length + 1, 0)) + begin for found, begin in zip(numbered, np.cumsum([0, *map(len, numbered)]), strict=False)]
        self._ends = np.cumsum([0, *map(len, starts)])
        begins = np.concatenate([np.zeros(0, np.int64), *starts])
        generator = np.random.default_rng(0)
        for _ in range(8):  # until no two runs that differ share a hash: once
            self._factors = generator.integers(0, 1 << 63, length, np.uint64) * np.uint64(2) + np.uint64(1)
            self._hashes, first, self._which = np.unique(self._hash(self._words)[begins], return_index=True, return_inverse=True)
            self._first = begins[first]
            if all(np.array_equal(self._words[begins + place], self._words[self._first[self._which] + place]) for place in range(length)):
                break
        else:
            raise AssertionError("runs of words that differ share hashes, whatever they are multiplied by")
        self._found = np.zeros(len(self._hashes), bool)

    def look_for(self, words: np.ndarray) -> None:
        """words: int32; 0 is one that no evaluation text has, or the border of a segment."""
        hashes = self._hash(words)
        if not len(hashes) or not len(self._hashes):
            return
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        (hits,) = np.nonzero(self._hashes[places] == hashes)
        runs = places[hits]
        same = np.ones(len(hits), bool)
        for place in range(self.length):
            same &= words[hits + place] == self._words[self._first[runs] + place]
        self._found[runs[same]] = True

    def any_found(self, text: int) -> bool:
        return bool(self._found[self._which[self._ends[text] : self._ends[text + 1]]].any())

    def _hash(self, words: np.ndarray) -> np.ndarray:
        """uint64 [runs]: of the run that begins at each word."""
        count = max(len(words) - self.length + 1, 0)
        hashes = np.zeros(count, np.uint64)
        for place, factor in enumerate(self._factors):
            hashes += words[place : place + count].astype(np.uint64) * factor
        return hashes


def _blocks(training: Iterable[str], numbers: dict[str, int], short: dict[Words, bool], length: int) -> Iterator[np.ndarray]:
    """int32: the training words' numbers, with a 0 between segments. Segments that are short texts are noted on the way."""
    block: list[int] = []
    for text in training:
        found = words_of(text)
        if len(found) < length:
            if found in short:
                short[found] = True
            continue
        block += [numbers.get(word, 0) for word in found]
        block.append(0)
        if len(block) >= AT_ONCE:
            yield np.array(block, np.int32)
            block = []
    yield np.array(block, np.int32)


_ASCII = re.compile("[a-z0-9]+")


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What is left out, and a word: a letter of a script without spaces, or letters and digits with the marks on them."""
    every = range(0x110000)
    mark = _class(every, lambda letter: unicodedata.category(letter) in ("Mn", "Mc"))
    alone = _class((point for low, high in UNSPACED for point in range(low, high + 1)), str.isalnum)
    left_out = _class(every, lambda letter: letter != "\u200b" and (unicodedata.category(letter) in ("Cf", "Me") or _selects(letter)))  # a zero-width space parts words
    return re.compile(f"[{left_out}]+"), re.compile(f"[{alone}][{mark}]*|[^\\W_{alone}]+(?:[{mark}]+[^\\W_{alone}]*)*")


def _selects(letter: str) -> bool:
    return "VARIATION SELECTOR" in unicodedata.name(letter, "")


def _class(points: Iterable[int], belongs: Callable[[str], bool]) -> str:
    """The inside of a character class of a regular expression."""
    ranges: list[list[int]] = []
    for point in points:
        if belongs(chr(point)):
            if ranges and ranges[-1][1] == point - 1:
                ranges[-1][1] = point
            else:
                ranges.append([point, point])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
