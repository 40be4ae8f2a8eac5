"""The contamination guard: against a reference that looks everywhere, and at the borders of its rule."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.benchmarks import _overlap
from pipeline.benchmarks._overlap import seen, words_of

TWELVE = "one two three four five six seven eight nine ten eleven twelve"
THIRTEEN = TWELVE + " thirteen"


def plain(texts: list[str], training: list[str], length: int) -> list[bool]:
    """Every run of every text held against every place of every training text."""
    others = [words_of(text) for text in training]
    said = []
    for words in map(words_of, texts):
        if len(words) < length:
            said.append(bool(words) and words in others)
            continue
        runs = [words[begin : begin + length] for begin in range(len(words) - length + 1)]
        said.append(any(run == other[begin : begin + length] for run in runs for other in others for begin in range(len(other))))
    return said


some = st.lists(st.text("ab cé中ก.", max_size=12), max_size=8)


@settings(deadline=None, max_examples=300)
@given(some, some, st.integers(1, 4))
def test_it_finds_what_looking_everywhere_finds(texts: list[str], training: list[str], length: int):
    assert seen(texts, training, length) == plain(texts, training, length)


@settings(deadline=None, max_examples=60)
@given(some, some, st.sampled_from([1, 2, 7]))
def test_how_much_is_looked_up_together_changes_nothing(texts: list[str], training: list[str], at_once: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_overlap, "AT_ONCE", at_once)
        assert seen(texts, training, 3) == plain(texts, training, 3)


def test_the_reference_finds_something_and_not_everything_control():
    assert plain(["a b c d", "a c b d", "a b", "b c"], ["x a b c x", "a b"], 3) == [True, False, True, False]


def test_12_words_in_common_are_not_seen_and_13_are():
    training = [f"before {TWELVE} after"]
    assert seen([f"x {TWELVE} y", f"x {THIRTEEN} y"], training) == [False, False]
    assert seen([f"x {TWELVE} y", f"x {THIRTEEN} y"], [f"before {THIRTEEN} after"]) == [False, True]
    assert seen([f"x {THIRTEEN}", f"{THIRTEEN} y", THIRTEEN], [THIRTEEN]) == [True, True, True]


def test_no_run_reaches_from_one_segment_into_the_next():
    half, rest = "one two three four five six", "seven eight nine ten eleven twelve thirteen"
    assert seen([THIRTEEN], [half, rest]) == [False]
    assert seen([THIRTEEN], [f"{half} {rest}"]) == [True]
    assert seen([THIRTEEN], [f"so many words before that it is no short segment {half}", f"{rest} and so many after that"]) == [False]
    assert seen([THIRTEEN], [f"{TWELVE} other", f"other {TWELVE}", f"one {rest} {half}"]) == [False]


def test_a_hash_that_two_runs_share_flags_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_overlap._Runs, "_hash", lambda runs, words: np.zeros(max(len(words) - runs.length + 1, 0), np.uint64))
    backwards = " ".join(reversed(THIRTEEN.split()))
    assert seen([THIRTEEN], [backwards]) == [False]
    assert seen([THIRTEEN], [backwards, THIRTEEN]) == [True]


def test_words_between_that_no_text_has_end_a_run():
    assert seen([THIRTEEN], [THIRTEEN.replace("seven", "seven unheard")]) == [False]


@pytest.mark.parametrize(
    "written",
    [
        THIRTEEN.upper(),
        THIRTEEN.replace(" ", ", "),
        THIRTEEN.replace(" ", "\n\n\t"),
        THIRTEEN.replace(" ", "\u00a0"),
        THIRTEEN.replace(" ", "-"),
        THIRTEEN.replace(" ", "\u200b"),
        THIRTEEN.replace(" ", " 😀 "),
        THIRTEEN.replace("thirteen", "thir\u00adteen"),
        THIRTEEN.replace("five", "ﬁve"),
        "".join(chr(ord(letter) + 0xFEE0) if letter != " " else "\u3000" for letter in THIRTEEN),
        f"«{THIRTEEN}»",
        "\ufeff" + THIRTEEN,
    ],
)
def test_case_punctuation_spaces_and_forms_do_not_hide_a_text(written: str):
    assert seen([written], [f"before {THIRTEEN} after"]) == [True]
    assert seen([THIRTEEN], [f"before {written} after"]) == [True]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Café", "cafe\u0301"),
        ("STRASSE", "straße"),
        ("ΌΣΟΣ", "όσος"),
        ("x²", "x2"),
        ("1️⃣", "1"),
        ("ｶﾞ", "ガ"),
        ("한글", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
        ("می‌خواهم", "میخواهم"),
        ("ẛ̣", "ṩ"),
        ("e\ufe0f", "e"),
    ],
)
def test_what_reads_the_same_is_the_same_word(one: str, other: str):
    assert words_of(one) == words_of(other) != ()


@pytest.mark.parametrize(("one", "other"), [("resume", "résumé"), ("1", "2"), ("mu", "µ"), ("क", "की"), ("o", "0")])
def test_what_reads_otherwise_is_another_word_control(one: str, other: str):
    assert words_of(one) != words_of(other)


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_the_form_in_which_a_text_is_stored_changes_no_word(text: str):
    words = words_of(text)
    assert words == words_of(unicodedata.normalize("NFD", text)) == words_of(unicodedata.normalize("NFC", text))
    assert all(any(letter.isalnum() for letter in word) for word in words)


@given(st.text(st.characters(max_codepoint=127)))
def test_the_short_way_for_ascii_gives_the_same_words(text: str):
    assert words_of(text + " é")[:-1] == words_of(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("हिन्दी में दो", 3),  # marks that stand between letters and on the last
        ("cafe\u0301 noi\u0308r", 2),
        ("糖尿病の治療", 6),
        ("タミフル", 4),
        ("กี่", 1),  # one letter with two marks
        ("ยาแก้ปวด", 7),
        ("당뇨병 치료", 2),
        ("IL6受体", 3),
        ("it's", 2),
        ("3.5mg", 2),
        ("😀❤️👩‍⚕️🇩🇪", 0),
        ("\u0301 \u0e35", 0),  # marks on nothing
        ("...", 0),
        ("", 0),
    ],
)
def test_how_many_words_a_text_has(text: str, count: int):
    assert len(words_of(text)) == count


def test_scripts_without_spaces_are_counted_by_letters():
    text = "糖尿病患者应当定期检查血糖"
    assert len(words_of(text)) == 13
    assert seen([text], ["前" + text + "后"]) == [True]
    assert seen([text], ["前" + text[:12] + "后" + text[12:]]) == [False]


def test_a_short_text_is_seen_only_as_a_whole_segment():
    assert seen(["What is gout?"], ["what is GOUT"]) == [True]
    assert seen(["What is gout?"], ["What is gout and what is not?"]) == [False]
    assert seen(["What is gout?"], ["is gout"]) == [False]
    assert seen([TWELVE], [THIRTEEN]) == [False]
    assert seen([TWELVE], [TWELVE]) == [True]


def test_a_text_without_words_is_never_seen():
    assert seen(["", "😀", " .. "], ["", "😀", " .. ", "other"]) == [False, False, False]


def test_nothing_is_in_nothing():
    assert seen([], []) == []
    assert seen([], [THIRTEEN]) == []
    assert seen([THIRTEEN, "short"], []) == [False, False]


def test_each_text_has_its_own_answer_also_where_texts_share_a_run():
    texts = ["", f"{THIRTEEN} a", "a b", THIRTEEN, f"b {THIRTEEN}", TWELVE, f"c {TWELVE} d"]
    assert seen(texts, [f"begin {THIRTEEN}", "A-B"]) == [False, True, True, True, True, False, False]


def test_the_training_texts_are_gone_through_once():
    assert seen([THIRTEEN, TWELVE], iter([THIRTEEN, TWELVE])) == [True, True]
