import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from pipeline.errors import InputError
from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals.vocabulary import CLASSES, Vocabulary, first_byte_classes, same_vocabulary, vocabulary_of
from tests import tiny
from tests.models import real
from tests.signals import dense

TOKENIZERS: dict[str, Callable[[], RecordTokenizer]] = {
    "sentencepiece": dense.teacher,
    "byte-level": dense.student,
    "gemma": lambda: real.tokenizer(real.GEMMA),
    "smollm": lambda: real.tokenizer(real.SMOLLM),
}
TEXTS = pytest.mark.parametrize("text", dense.NASTY_TEXTS.values(), ids=dense.NASTY_TEXTS)
EACH = pytest.mark.parametrize("name", TOKENIZERS)


def bytes_of(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary.token_bytes[id] for id in ids)


@EACH
@TEXTS
def test_the_bytes_of_a_texts_tokens_are_the_text(name: str, text: str):
    tokenizer = TOKENIZERS[name]()
    assert bytes_of(tokenizer.vocabulary, tokenizer.encode([text])[0]) == text.encode()


@EACH
@settings(deadline=None, max_examples=50)
@given(text=st.text(st.one_of(st.characters(codec="utf-8", exclude_characters="▁"), st.sampled_from(" \n\t\r19a.é"))))
def test_the_bytes_of_any_texts_tokens_are_the_text_or_it_is_refused(name: str, text: str):
    """SmolLM has no token for some bytes, such as those that begin the unused planes of Unicode, and leaves them out."""
    tokenizer = TOKENIZERS[name]()
    if all(bytes([byte]) in tokenizer.vocabulary.id_of_bytes for byte in text.encode()):
        assert bytes_of(tokenizer.vocabulary, tokenizer.encode([text])[0]) == text.encode()
    else:
        assert name == "smollm"
        with pytest.raises(InputError, match="does not keep the bytes"):
            tokenizer.render(dense.asked("what", text))


@EACH
def test_the_lower_one_eighth_block_is_kept_or_seen_to_be_lost(name: str):
    """SentencePiece makes a space of U+2581: such a text is refused, never silently changed."""
    tokenizer = TOKENIZERS[name]()
    text = "a▁b"
    kept = bytes_of(tokenizer.vocabulary, tokenizer.encode([text])[0]) == text.encode()
    assert kept == (name in ("byte-level", "smollm"))
    record = dense.asked("what", text)
    if kept:
        tokenizer.render(record)
    else:
        with pytest.raises(InputError, match="does not keep the bytes"):
            tokenizer.render(record)


def test_control_tables_by_vocabulary_string_are_caught():
    """Gemma-like tokens taken as byte-level ones and the other way round."""
    for tokenizer, other in ((dense.sentencepiece_tiny(), "ByteLevel"), (dense.byte_level_tiny(), "ByteFallback")):
        parsed = json.loads(tokenizer.backend_tokenizer.to_str())
        wrong = vocabulary_of(parsed | {"decoder": {"type": other}, "pre_tokenizer": None})
        text = "What is the kidney \n fibrosé?"
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert bytes_of(wrong, ids) != text.encode()


def test_a_tokenizer_of_neither_kind_is_an_error():
    with pytest.raises(InputError, match="neither byte-level"):
        vocabulary_of({"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}})


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece])
def test_an_added_token_is_text_unless_it_is_special(make):
    tokenizer = make(["a b c <table> \n\n"])
    tokenizer.add_tokens([AddedToken("<table>", special=False), AddedToken("\n\n", special=False, normalized=False), AddedToken("é ", special=False, normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    ours = RecordTokenizer(tokenizer, "plain", "tiny")
    for text in ("a <table> b", "a\n\n\nb", "é é é", "<turn> <table><turn>"):
        [ids] = ours.encode([text])
        assert bytes_of(ours.vocabulary, ids) == text.encode()
        assert not ours.vocabulary.special[ids].any()
    assert ours.vocabulary.token_bytes[tokenizer.convert_tokens_to_ids("<table>")] == b"<table>"
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert ours.vocabulary.special[turn]
    assert ours.vocabulary.token_bytes[turn] == b""


def test_special_tokens_have_no_bytes_and_all_others_have_some():
    for make in (dense.teacher, dense.student):
        vocabulary = make().vocabulary
        assert all((token == b"") == special for token, special in zip(vocabulary.token_bytes, vocabulary.special.tolist(), strict=True))


def test_every_byte_alone_is_a_token_of_both_kinds():
    for make in (dense.teacher, dense.student):
        assert all(bytes([byte]) in make().vocabulary.id_of_bytes for byte in range(256))


def test_bytes_of_several_tokens_are_the_lowest_that_is_no_byte_fallback():
    vocabulary = dense.teacher().vocabulary
    [newline_fallback] = [id for id in vocabulary.fallback_ids if vocabulary.token_bytes[id] == b"a"]
    found = vocabulary.id_of_bytes[b"a"]
    assert found > newline_fallback
    assert found not in vocabulary.fallback_ids
    assert vocabulary.id_of_bytes[b"\xff"] in vocabulary.fallback_ids
    twice = Vocabulary([b"", b"x", b"y", b"x"], np.array([True, False, False, False]))
    assert twice.id_of_bytes == {b"x": 1, b"y": 2}


def test_a_vocabulary_is_the_same_with_unused_rows_at_the_end_and_another_with_anything_else():
    one = dense.teacher().vocabulary
    n = len(one)
    padded = replace(one, token_bytes=[*one.token_bytes, b"", b""], special=np.append(one.special, [False, False]))
    assert same_vocabulary(one, one)
    assert same_vocabulary(one, padded)
    assert same_vocabulary(padded, one)
    swapped = list(one.token_bytes)
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    more = replace(one, token_bytes=[*one.token_bytes, b"new"], special=np.append(one.special, False))
    role = one.special.copy()
    role[n - 1] = True
    for other in (dense.student().vocabulary, replace(one, token_bytes=swapped), more, replace(one, special=role)):
        assert not same_vocabulary(one, other)
        assert not same_vocabulary(other, one)


def test_a_digest_tells_vocabularies_apart_and_does_not_depend_on_where_tokens_end():
    def of(*tokens: bytes, special: bool = False) -> str:
        return Vocabulary(list(tokens), np.array([special] * len(tokens))).digest()

    assert of(b"a", b"b") == of(b"a", b"b")
    assert len({of(b"a", b"b"), of(b"b", b"a"), of(b"ab"), of(b"ab", b""), of(b"", b"ab"), of(b"a", b"b", special=True)}) == 6


# --- classes of first bytes ---


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (b" a", "space"),
        (b"\n", "newline"),
        (b"\r\n", "other control"),
        (b"\0", "other control"),
        (b"\x7f", "other control"),
        (b"\t\t", "tab"),
        (b"apple", "a-z"),
        (b"z", "a-z"),
        (b"A1", "A-Z"),
        (b"Z", "A-Z"),
        (b"09", "0-9"),
        (b"9", "0-9"),
        (b'"a', "quote"),
        (b"'", "quote"),
        (b"`", "quote"),
        (b".", "sentence punctuation"),
        (b",x", "sentence punctuation"),
        (b"?!", "sentence punctuation"),
        (b"(", "other ASCII"),
        (b"@", "other ASCII"),
        (b"{", "other ASCII"),
        ("é".encode(), "2-byte lead"),
        (b"\xc2", "2-byte lead"),
        (b"\xdf", "2-byte lead"),
        ("患".encode(), "3- or 4-byte lead"),
        ("🙂".encode(), "3- or 4-byte lead"),
        (b"\xf4", "3- or 4-byte lead"),
        (b"\x80", "continuation"),
        (b"\xbfa", "continuation"),
        (b"\xc0", "no UTF-8"),
        (b"\xc1", "no UTF-8"),
        (b"\xf5", "no UTF-8"),
        (b"\xff", "no UTF-8"),
    ],
)
def test_a_token_is_of_the_class_of_its_first_byte(token: bytes, name: str):
    vocabulary = Vocabulary([b"", token, b""], np.array([True, False, True]), end_ids=(2,))
    found = first_byte_classes(vocabulary)
    assert found.dtype == np.int64
    assert [CLASSES[number] for number in found.tolist()] == ["other special", name, "end"]


def test_every_byte_has_one_class_and_every_class_a_byte_or_a_special_token():
    vocabulary = Vocabulary([bytes([byte]) for byte in range(256)] + [b"", b""], np.array([False] * 256 + [True, True]), end_ids=(257,))
    counts = np.bincount(first_byte_classes(vocabulary), minlength=len(CLASSES))
    assert len(CLASSES) == len(counts) == 16
    assert (counts > 0).all()
    assert dict(zip(CLASSES, counts.tolist(), strict=True))["continuation"] == 64
