from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import Mismatch
from pipeline.lookup import find, names
from pipeline.signals.projection import REST
from pipeline.signals.vocabulary import Vocabulary
from tests.models import real
from tests.signals.dense import student, teacher

ACROSS = ("exact_bytes", "first_token", "contextual")


def sides(models: str):
    return (teacher(), student()) if models == "tiny" else (real.tokenizer(real.GEMMA), real.tokenizer(real.SMOLLM))


def made(method: str, models: str = "tiny"):
    one, other = sides(models)
    return find("projections", method)(one.vocabulary, other.vocabulary, other.encode)


@pytest.mark.parametrize("method", ACROSS)
def test_only_what_ends_an_answer_is_mapped_among_special_tokens_and_only_to_the_students_end(method: str):
    one, other = sides("tiny")
    student_id = made(method).student_id
    assert student_id.dtype == np.int32
    assert len(student_id) == len(one.vocabulary)
    for id in np.flatnonzero(one.vocabulary.special).tolist():
        assert student_id[id] == (other.vocabulary.end_ids[0] if id in one.vocabulary.end_ids else REST)
    to_special = [id for id, to in enumerate(student_id.tolist()) if to != REST and other.vocabulary.special[to]]
    assert to_special == sorted(one.vocabulary.end_ids)


@pytest.mark.parametrize("models", ["tiny", "real"])
def test_exact_bytes_places_tokens_of_equal_bytes_and_no_others(models: str):
    one, other = sides(models)
    student_id = made("exact_bytes", models).student_id
    available = set(other.vocabulary.token_bytes)
    for id, token in enumerate(one.vocabulary.token_bytes):
        if token:
            assert (student_id[id] != REST) == (token in available)
            assert student_id[id] == REST or other.vocabulary.token_bytes[student_id[id]] == token


@pytest.mark.parametrize("models", ["tiny", "real"])
def test_first_token_places_every_token_on_one_that_its_bytes_begin_with(models: str):
    one, other = sides(models)
    student_id = made("first_token", models).student_id
    bytes_of = other.vocabulary.token_bytes
    for id, token in enumerate(one.vocabulary.token_bytes):
        if not token:
            continue
        if student_id[id] == REST:
            assert not any(token[:n] in other.vocabulary.id_of_bytes for n in range(1, len(token) + 1))
        else:
            assert bytes_of[student_id[id]]
            assert token.startswith(bytes_of[student_id[id]])
    exact = made("exact_bytes", models).student_id
    assert (student_id[exact != REST] == exact[exact != REST]).all()


def test_first_token_of_a_text_is_the_first_that_the_student_makes_of_it():
    one, other = sides("tiny")
    student_id = made("first_token").student_id
    exact = made("exact_bytes").student_id
    seen = 0
    for id, token in enumerate(one.vocabulary.token_bytes):
        if token and exact[id] == REST and not one.vocabulary.special[id] and token[:1] < b"\xff" and token.isascii():
            assert student_id[id] == other.encode([token.decode()])[0][0]
            seen += 1
    assert seen > 20


def test_bytes_that_are_no_text_of_their_own_go_to_their_longest_prefix():
    one = Vocabulary([b"", b"ab\xf0\x9f", b"\xf0\x9f\x99", b"\xfe"], np.array([True, False, False, False]))
    other = Vocabulary([b"", b"a", b"ab", b"\xf0", b"\xf0\x9f"], np.array([True, False, False, False, False]))
    student_id = find("projections", "first_token")(one, other, lambda texts: [[1] for _ in texts]).student_id
    assert student_id.tolist() == [REST, 2, 4, REST]


def test_a_first_token_with_a_space_of_the_encoders_own_is_not_taken():
    """SentencePiece may put a space before a text."""
    one = Vocabulary([b"", b"abc"], np.array([True, False]))
    other = Vocabulary([b"", b" ", b" ab", b"a"], np.array([True, False, False, False]))
    student_id = find("projections", "first_token")(one, other, lambda texts: [[2, 3] for _ in texts]).student_id
    assert student_id.tolist() == [REST, 3]


@pytest.mark.parametrize("method", ACROSS)
def test_a_student_without_an_end_gives_the_end_to_the_rest(method: str):
    one, other = sides("tiny")
    student_id = find("projections", method)(one.vocabulary, replace(other.vocabulary, end_ids=()), other.encode).student_id
    assert (student_id[np.flatnonzero(one.vocabulary.special)] == REST).all()


def test_contextual_is_first_token_with_the_realised_path():
    assert (made("contextual").student_id == made("first_token").student_id).all()
    assert made("contextual").realised_path
    assert not made("first_token").realised_path


def test_identity_maps_every_token_to_itself_and_refuses_other_vocabularies():
    one, other = sides("tiny")
    identity = find("projections", "identity")
    assert (identity(one.vocabulary, one.vocabulary, one.encode).student_id == np.arange(len(one.vocabulary))).all()
    with pytest.raises(Mismatch, match="contextual"):
        identity(one.vocabulary, other.vocabulary, other.encode)


def test_identity_maps_the_end_of_one_template_to_that_of_the_other():
    one = sides("tiny")[1].vocabulary
    end, turn = one.token_bytes.index(b""), one.token_bytes.index(b"", 1)
    student_id = find("projections", "identity")(replace(one, end_ids=(turn, end)), replace(one, end_ids=(end,)), None).student_id
    assert student_id[turn] == student_id[end] == end


def test_identity_gives_no_mass_to_tokens_that_the_student_does_not_have():
    one = sides("tiny")[1].vocabulary
    longer = replace(one, token_bytes=[*one.token_bytes, b"", b""], special=np.append(one.special, [True, False]))
    assert find("projections", "identity")(longer, one, None).student_id.max() < len(one)


def test_all_methods_that_there_are_are_tested_here():
    assert set(names("projections")) == {*ACROSS, "identity"}


def test_real_tokens_placed_by_their_bytes_are_as_many_as_were_measured():
    """Gemma 3 and SmolLM share the bytes of most of SmolLM's tokens; by vocabulary strings they would share a third of that."""
    one, other = sides("real")
    exact = made("exact_bytes", "real").student_id
    shared = len(set(exact[exact != REST].tolist())) / len(other.vocabulary)
    by_string = len(set(one.tokenizer.get_vocab()) & set(other.tokenizer.get_vocab())) / len(other.vocabulary)
    assert shared > 0.6
    assert by_string < 0.6 * shared
