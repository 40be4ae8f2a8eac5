from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import InputError
from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals import first_tokens as module
from pipeline.signals.first_tokens import NONE, FirstTokens
from pipeline.signals.vocabulary import Vocabulary
from tests.models import real
from tests.projections.made import Toy, spaced
from tests.signals.dense import student, teacher
from tests.tiny import questions

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = (
    *("the", " kidney", "thinning", " A", "x", "'s", "n't", "fibrosé", "ü", "ß"),
    *("1", "12", "345", "1234567", " 12", "٣٩"),
    *(" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028"),
    *(".", ", ", "...", "):\n", "(", '"', "--", "_", "</s>", "\0"),
    *("🙂", "👩‍👩‍👧", "患者", "は発熱し", "、", "환자", "हिन्दी", "मरीज", "المريض", "e\u0301", "\u0301", "a\u0308\u0323"),
)


@cache
def llama_like(numbers: str = " ".join(f"{n:02}" for n in range(100)), normalizer: Any = None) -> RecordTokenizer:
    """Byte-level, with the splitting of Llama 3 and a taste for long runs. numbers: what it learns them from; Llama 3 has all below a thousand."""
    texts = (
        [numbers] * 9 + [text for row in questions(48) for text in (row["question"], row["answer"])] + ["123 456 789 112 345 " * 9, "(...) ---- :\n\n\n    x\n\n" * 9, "fibrosé é患者 患者は発熱" * 9]
    )
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=560, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False))
    return RecordTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"), "plain", "Llama-like")


@cache
def with_a_space(kind: str) -> RecordTokenizer:
    return RecordTokenizer(spaced(kind), "plain", kind)


STUDENTS = {
    "byte-level": student,
    "byte-level, split as Llama 3 does": llama_like,
    "SentencePiece-like": teacher,
    "a space prepended": lambda: with_a_space("prepended"),
    "a space of Metaspace": lambda: with_a_space("metaspace"),
    "smollm": lambda: real.tokenizer(real.SMOLLM),
    "llama": lambda: real.tokenizer(real.LLAMA3),
}


@cache
def first_of(name: str) -> FirstTokens:
    return FirstTokens(STUDENTS[name]().vocabulary, STUDENTS[name]().encode)


def wanted(tokenizer: RecordTokenizer, before: bytes, new: bytes) -> int:
    """From one encoding of the whole text; `before` is a text."""
    token_bytes, added = tokenizer.vocabulary.token_bytes, len(tokenizer.encode(["a"])[0]) > 1 or len(tokenizer.vocabulary.token_bytes[tokenizer.encode(["a"])[0][0]]) > 1
    text = before + new
    while not is_text(text):
        text = text[:-1]
    at = -2 if added else 0
    for id in tokenizer.encode(["\n" * added + text.decode()])[0] if len(text) > len(before) else []:
        if not token_bytes[id]:
            break
        if at == len(before):
            return 2 * id + (at + len(token_bytes[id]) >= len(text))
        if at > len(before):
            return NONE
        at += len(token_bytes[id])
    if at > len(before):
        return NONE
    longest = [id for id, token in enumerate(token_bytes) if token and new.startswith(token)]
    return 2 * tokenizer.vocabulary.id_of_bytes[max((token_bytes[id] for id in longest), key=len)] + 1 if longest else NONE


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def differences(name: str, first: FirstTokens, text: bytes, place: int, new: bytes) -> list[str]:
    """What the text as far as it matters gives, and the shortcut where there is one, against the whole text."""
    true = wanted(STUDENTS[name](), text[:place], new)
    (left,) = first.left_of(text, np.array([place]), np.array([0]))
    found = [] if first.of([(left, new)])[0] == true else ["left"]
    if left and first.safe[left[-1], new[0]] and first.of([(b"", new)])[0] != true:
        found.append("safe")
    return found


@pytest.mark.parametrize("name", STUDENTS)
def test_what_is_left_of_a_text_and_the_shortcut_give_what_the_whole_text_gives(name, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 10_000)
    first = first_of(name)

    @settings(deadline=None, max_examples=150 if name in ("smollm", "llama") else 250)
    @given(pieces=st.lists(st.sampled_from(PIECES), max_size=6), more=st.lists(st.sampled_from(PIECES), min_size=1, max_size=2), cut=st.integers(0, 40), short=st.integers(0, 9))
    def check(pieces, more, cut, short):
        text = "".join(pieces)
        new = "".join(more).encode()
        place = len(text[:cut].encode())
        assert differences(name, first, text.encode(), place, new[: len(new) - short] or new) == []

    check()


@pytest.mark.parametrize("name", ["byte-level", "byte-level, split as Llama 3 does", "SentencePiece-like"])
def test_control_cutting_anywhere_is_seen(name, monkeypatch):
    tokenizer = STUDENTS[name]()
    monkeypatch.setattr(module, "_safe_bounds", lambda vocabulary: np.ones((256, 256), dtype=bool))
    careless = FirstTokens(tokenizer.vocabulary, tokenizer.encode)
    found = set()
    for text in ("thinning 12345", "the kidney.", "A  cyst", "12 of 100"):
        for place in range(1, len(text)):
            found |= set(differences(name, careless, text.encode(), place, text[place:].encode()))
    assert found == {"left", "safe"}


def test_an_answer_tells_the_token_and_whether_it_reaches_the_end():
    toy = Toy("123x", [("1", "2"), ("12", "3")])
    first = FirstTokens(toy.vocabulary, toy.encode)
    answers = {
        (b"", b"1"): (toy.id("1"), True),
        (b"", b"12"): (toy.id("12"), True),
        (b"", b"123"): (toy.id("123"), True),
        (b"", b"12x"): (toy.id("12"), False),
        (b"x", b"12"): (toy.id("12"), True),
        (b"x1", b"1"): (toy.id("1"), True),
        (b"1", b"x2"): (toy.id("x"), False),
    }
    assert first.of(list(answers)).tolist() == [2 * id + open for id, open in answers.values()]
    assert first.of([(b"1", b"2"), (b"12", b"3"), (b"x1", b"23")]).tolist() == [NONE] * 3


# --- what is no text ---


def test_bytes_that_are_not_yet_a_character_begin_with_the_longest_token_that_they_begin_with():
    first, vocabulary = first_of("byte-level"), student().vocabulary
    for new in (b"\xf0", b"\xf0\x9f\x99", b"\xc3", b"\x99x", b"\xff"):
        for left in (b"", b"x", b" ", b"\xf0\x9f"):
            if not is_text(left + new):
                assert first.of([(left, new)]).tolist() == [2 * vocabulary.longest_prefix(new) + 1]


def test_an_incomplete_character_at_the_end_is_as_if_it_were_not_there():
    """But what comes before it can still grow: it is the end of what is known."""
    first = first_of("byte-level")
    the, dot = student().vocabulary.id_of_bytes[b" the"], student().vocabulary.id_of_bytes[b"."]
    assert first.of([(b"of", b" the\xc3"), (b"of", b" the.\xf0\x9f"), (b"of", b" the")]).tolist() == [2 * the + 1, 2 * the, 2 * the + 1]
    assert first.of([(b"x", b".\xe6\x82")]).tolist() == [2 * dot + 1]


def test_bytes_that_complete_a_character_are_read_with_what_came_before():
    for name in ("byte-level", "SentencePiece-like"):
        first, vocabulary = first_of(name), STUDENTS[name]().vocabulary
        smile = "🙂".encode()
        for n in (1, 2, 3):
            ends = np.cumsum([0, *(len(vocabulary.token_bytes[id]) for id in STUDENTS[name]().encode(["x🙂"])[0])]).tolist()
            answer = first.of([(b"x" + smile[:n], smile[n:])])[0]
            assert (answer != NONE) == (n + 1 in ends)


def test_what_begins_with_no_token_at_all_begins_with_none():
    vocabulary = Vocabulary([b"", b"a", b"\xf0"], np.array([True, False, False]))
    first = FirstTokens(vocabulary, lambda texts: [[1 if letter == "a" else 0 for letter in text] for text in texts])
    assert first.of([(b"", b"\xf0\x9f"), (b"", b"\x9f"), (b"a", b"\x9f\x99"), (b"", b"z")]).tolist() == [5, NONE, NONE, NONE]


def test_a_token_that_the_tokenizer_does_not_know_ends_what_is_read():
    vocabulary = Vocabulary([b"", b"a", b"zz"], np.array([True, False, False]))
    first = FirstTokens(vocabulary, lambda texts: [[1 if letter == "a" else 0 for letter in text] for text in texts])
    assert first.of([(b"a", b"az"), (b"a", b"zza")]).tolist() == [2, 5]


def test_a_text_is_never_cut_inside_a_character():
    first = first_of("byte-level")
    text = "xé患🙂 ".encode() * 20
    for place in range(len(text) + 1):
        (left,) = first.left_of(text, np.array([place]), np.array([0]))
        assert text[:place].endswith(left)
        assert not left or left[0] & 0xC0 != 0x80 or place - len(left) == 0


def test_what_is_left_never_reaches_back_before_the_text_begins():
    first = first_of("byte-level")
    text = b"12345678 12345678"
    left = first.left_of(text, np.arange(len(text) + 1), np.minimum(np.arange(len(text) + 1), 12))
    assert [len(part) for part in left[:13]] == [0] * 13
    assert all(text[12:].startswith(part) or part in text[12:] for part in left[13:])


# --- tokenizers with ways of their own ---


@pytest.mark.parametrize("kind", ["prepended", "metaspace"])
def test_a_space_of_the_tokenizers_own_is_not_taken_for_text(kind):
    tokenizer = with_a_space(kind)
    first, vocabulary = FirstTokens(tokenizer.vocabulary, tokenizer.encode), tokenizer.vocabulary
    assert vocabulary.token_bytes[tokenizer.encode(["the"])[0][0]].startswith(b" ")
    for left, new in ((b"", b"the kidney"), (b"", b" the kidney"), (b"of", b" the"), (b"", b" "), (b"\n", b"of")):
        answer = first.of([(left, new)])[0]
        assert answer != NONE
        assert new.startswith(vocabulary.token_bytes[answer >> 1])


def test_a_tokenizer_that_adds_what_cannot_be_told_from_the_text_is_refused():
    toy = Toy("ax", [])
    with pytest.raises(InputError, match="cannot be asked for single tokens"):
        FirstTokens(toy.vocabulary, lambda texts: toy.encode([text + "x" for text in texts]))


def test_a_text_that_begins_with_a_line_break_after_a_space_of_the_tokenizers_own():
    tokens = ["▁", "\n", "a", "b", "\n\n", "\t"]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens, 1)}, [("\n", "\n")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    vocabulary = Vocabulary([b"", *(token.replace("▁", " ").encode() for token in tokens)], np.array([True] + [False] * len(tokens)))
    first = FirstTokens(vocabulary, lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)])
    assert first.of([(b"", b"\na"), (b"", b"\n\nb")]).tolist() == [2 * vocabulary.id_of_bytes[b"\n"], 2 * vocabulary.id_of_bytes[b"\n\n"]]


@pytest.mark.parametrize("why", ["words that are tokens are not merged", "marks are composed", "digits are taken by three"])
def test_the_shortcut_is_not_taken_where_the_text_before_matters(why, monkeypatch):
    """Llama 3 takes a word that is a token whole, though merging its letters would never give that; Qwen makes `e` and its accent one letter."""
    tokenizer, before, new = {
        "words that are tokens are not merged": (whole_words(), "a", "бв"),
        "marks are composed": (llama_like(normalizer=normalizers.NFC()), "the", "\u0301 x"),
        "digits are taken by three": (llama_like(numbers="12 23"), "12345", "12"),
    }[why]
    monkeypatch.setitem(STUDENTS, "this", lambda: tokenizer)
    first = FirstTokens(tokenizer.vocabulary, tokenizer.encode)
    assert differences("this", first, before.encode(), len(before), new.encode()) == []


def whole_words() -> Any:
    """`бв` is a token that no merge makes."""
    tokens = ["a", "б", "в", "бв"]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens, 1)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    vocabulary = Vocabulary([b"", *(token.encode() for token in tokens)], np.array([True] + [False] * len(tokens)))
    return SimpleNamespace(vocabulary=vocabulary, encode=lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)])


# --- memory ---


def test_a_pair_is_asked_for_once():
    asked = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return student().encode(texts)

    first = FirstTokens(student().vocabulary, encode)
    asked.clear()
    first.of([(b"of", b" the"), (b"", b" the"), (b"of", b" the")])
    first.of([(b"of", b" the"), (b"of", b" th")])
    assert sorted(asked) == [" the", "of th", "of the"]


def test_no_more_is_remembered_than_most_and_answers_stay_right(monkeypatch):
    monkeypatch.setattr(module, "MOST", 5)
    first, random = FirstTokens(student().vocabulary, student().encode), np.random.default_rng(0)
    pairs = [(left.encode(), new.encode()) for left in ("", "of", "12", " ") for new in (" the", "345", "\n", "kidney")]
    answers = dict(zip(pairs, first_of("byte-level").of(pairs).tolist(), strict=True))
    for _ in range(60):
        some = [pairs[i] for i in random.integers(0, len(pairs), 4)]
        assert first.of(some).tolist() == [answers[pair] for pair in some]
        assert len(first._known) <= 5


def test_nothing_asked_is_nothing_answered():
    assert first_of("byte-level").of([]).tolist() == []
