import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.losses.alm import alm
from pipeline.losses.cross_entropy import cross_entropy
from pipeline.signals.chunks import Chunks, chunked, joined
from pipeline.signals.records import ANSWER, END, Record, Segment, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import CLASSES, begins_anew, first_byte_classes
from tests.signals.dense import NASTY_TEXTS, asked, student, targets_of, teacher, tokens_of

TEMPERATURES = [1.0]
RECORDS = [asked("What is it?", "thinning 12345 of the kidney 12 of 100."), *(asked("And?", text) for text in NASTY_TEXTS.values())]


def said(tokens: Tokens, seed: int = 0) -> tuple[Targets, np.ndarray]:
    logits = np.random.default_rng(seed).normal(0, 2, (len(tokens) - 1, len(teacher().vocabulary)))
    targets = targets_of(logits, tokens, np.arange(len(tokens) - 1, dtype=np.int32), 8, TEMPERATURES)
    return targets, targets.realised_logprob


def by_two_pointers(a: Tokens, logprob: np.ndarray, b: Tokens) -> list[tuple[int, int, float]]:
    """(position before the first student token, position before the last, the teacher's log-likelihood), one answer, both with an end."""
    i, j = (int(np.flatnonzero(tokens.kind >= ANSWER)[0]) for tokens in (a, b))
    found = []
    fits = a.lead[i] == b.lead[j]
    while a.kind[i] != END and b.kind[j] != END:
        begin, total = j, 0.0
        total += logprob[i - 1]
        while a.end[i] != b.end[j]:
            if a.end[i] < b.end[j]:
                i += 1
                total += logprob[i - 1]
            else:
                j += 1
        if fits:
            found.append((begin - 1, j - 1, total))
        fits, i, j = True, i + 1, j + 1
    return [*found, (j - 1, j - 1, float(logprob[i - 1]))]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.segments[-1].text[:20])
def test_chunks_are_those_that_two_pointers_find(record: Record):
    a, b = teacher().render(record), student().render(record)
    targets, logprob = said(a)
    found = chunked(a, targets, b)
    wanted = by_two_pointers(a, logprob, b)
    assert list(zip(found.begin.tolist(), found.end.tolist(), strict=True)) == [(begin, end) for begin, end, _ in wanted]
    np.testing.assert_allclose(found.logprob, [total for *_, total in wanted], rtol=1e-5)


def test_control_the_teachers_log_probabilities_shifted_by_one_are_caught():
    a, b = teacher().render(RECORDS[0]), student().render(RECORDS[0])
    targets, logprob = said(a)
    assert not np.allclose(chunked(a, targets, b).logprob, [total for *_, total in by_two_pointers(a, np.roll(logprob, 1), b)], rtol=1e-2)


def test_chunks_of_two_answers_do_not_reach_from_one_into_the_other():
    record = Record("r", (Segment("user", "One?"), Segment("assistant", "12345 cysts"), Segment("user", "Two?"), Segment("assistant", "67 stones")))
    a, b = teacher().render(record), student().render(record)
    targets, _ = said(a)
    found = chunked(a, targets, b)
    for begin, end in zip(found.begin, found.end, strict=True):
        kinds = set(b.kind[begin + 1 : end + 2].tolist())
        assert kinds in ({ANSWER}, {END})
    assert (b.kind[found.end + 1] == END).sum() == 2


def test_a_chunk_with_a_teachers_token_that_is_not_described_is_left_out():
    a, b = tokens_of([1, 3, 4], 0, end=9), tokens_of([3, 4], 0, end=9)
    position = np.array([0, 2, 3], np.int32)
    targets = targets_of(np.zeros((3, 10)), a, position, 2, TEMPERATURES)
    found = chunked(a, targets, b)
    assert found.begin.tolist() == [1, 2]
    assert found.logprob == pytest.approx([-math.log(10)] * 2)


def test_a_batch_has_the_chunks_of_its_records_one_after_another():
    records = [teacher().render(record) for record in RECORDS[:3]]
    others = [student().render(record) for record in RECORDS[:3]]
    parts = [chunked(a, said(a, seed)[0], b) for seed, (a, b) in enumerate(zip(records, others, strict=True))]
    chunks = joined(parts, [tokens.answer_positions() for tokens in others])
    assert len(chunks.logprob) == len(chunks.last) == sum(len(part.begin) for part in parts)
    rows = [(n, int(position)) for n, tokens in enumerate(others) for position in tokens.answer_positions()]
    wanted = [[(n, position) for position in range(begin, end + 1)] for n, part in enumerate(parts) for begin, end in zip(part.begin, part.end, strict=True)]
    found: list[list[tuple[int, int]]] = [[] for _ in wanted]
    for row, chunk in zip(chunks.row.tolist(), chunks.chunk.tolist(), strict=True):
        found[chunk].append(rows[row])
    assert found == wanted
    assert [rows[row] for row in chunks.last.tolist()] == [chunk[-1] for chunk in wanted]


# --- the loss ---


def reference(ours: float, theirs: float, temperature: float) -> float:
    """float64, straight from the paper's formula."""

    def cross(a: float, b: float) -> float:
        return -(math.exp(a) * b + (1 - math.exp(a)) * math.log1p(-math.exp(b)))

    a, b = theirs / temperature - 1e-6, ours / temperature - 1e-6
    return temperature * (cross(a, b) - cross(a, a))


def one_chunk(logprob: float, theirs: float, temperature: float = 100.0) -> torch.Tensor:
    """The loss of a student whose one token has this log-probability."""
    logits = torch.tensor([[logprob, math.log1p(-math.exp(logprob))]], requires_grad=True)
    chunks = Chunks(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([theirs]), torch.tensor([False]))
    return alm(logits, torch.tensor([0]), chunks, temperature=temperature)[0]


@settings(deadline=None, max_examples=80)
@given(ours=st.floats(-12, -0.05), theirs=st.floats(-60, -0.05), temperature=st.sampled_from([1.0, 10.0, 100.0]))
def test_the_loss_is_that_of_the_formula(ours: float, theirs: float, temperature: float):
    assert one_chunk(ours, theirs, temperature).item() == pytest.approx(reference(ours, theirs, temperature), rel=2e-3, abs=2e-3)


def test_at_a_high_temperature_it_comes_to_the_limit():
    """(l_T - l_S) + l_T log(l_S / l_T) of the paper."""
    theirs, ours = -3.2, -1.7
    limit = (theirs - ours) + theirs * math.log(ours / theirs)
    assert limit == pytest.approx(0.524, abs=1e-3)
    assert one_chunk(ours, theirs).item() == pytest.approx(0.516, abs=1e-3)
    assert one_chunk(ours, theirs, 1000.0).item() == pytest.approx(limit, rel=0.01)


def test_it_is_nothing_where_both_agree_and_its_gradient_turns_there():
    for theirs in (-0.5, -3.0, -9.0):
        assert one_chunk(theirs, theirs).item() == pytest.approx(0, abs=1e-3)
        for ours, sign in ((theirs - 0.3, -1), (theirs + 0.3, 1)):
            logits = torch.tensor([[ours, math.log1p(-math.exp(ours))]], requires_grad=True)
            chunks = Chunks(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([theirs]), torch.tensor([False]))
            alm(logits, torch.tensor([0]), chunks).sum().backward()
            assert math.copysign(1, logits.grad[0, 0].item()) == sign


@pytest.mark.parametrize("theirs", [-1e-7, 0.0, -1e4, -1e30])
@pytest.mark.parametrize("ours", [0.0, -1e-7, -30.0, -1e4])
def test_certain_and_impossible_chunks_are_no_nan(ours: float, theirs: float):
    logits = torch.tensor([[ours, -20.0 if ours > -1 else 0.0]], requires_grad=True)
    chunks = Chunks(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([theirs]), torch.tensor([False]))
    loss = alm(logits, torch.tensor([0]), chunks)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


def test_a_chunks_loss_stands_at_its_last_row_and_reaches_all_its_tokens():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    realised = torch.tensor([1, 2, 3, 4])
    chunks = Chunks(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([1, 2]), torch.tensor([-1.0, -2.0]), torch.tensor([True, False]))
    loss = alm(logits, realised, chunks)
    assert (loss != 0).tolist() == [False, True, True, False]
    logprob = -cross_entropy(logits, realised).detach().double()
    assert loss[1].item() == pytest.approx(reference(float(logprob[:2].sum()), -1.0, 100.0), rel=1e-2)
    loss.sum().backward()
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [True, True, True, False]


# --- with what is expected behind a stretch ---


def with_boundary(tokens: Tokens, seed: int) -> tuple[Targets, np.ndarray]:
    """Targets with the masses of the first-byte classes, and the teacher's log-probabilities [P, V]."""
    random, vocabulary = np.random.default_rng(seed), teacher().vocabulary
    logits = random.normal(0, 2, (len(tokens) - 1, len(vocabulary)))
    logits[:, begins_anew(vocabulary)] += random.choice([-8.0, -8.0, 4.0], (len(logits), 1))  # now sure of it, now sure of the contrary
    logprobs = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    classes = first_byte_classes(vocabulary)
    with np.errstate(divide="ignore"):
        boundary = np.stack([np.log(np.exp(logprobs[:, classes == c]).sum(1)) for c in range(len(CLASSES))], 1).astype(np.float32)
    return replace(targets_of(logits, tokens, np.arange(len(tokens) - 1, dtype=np.int32), 8, TEMPERATURES), boundary=boundary), logprobs


def joined_by_loops(a: Tokens, logprobs: np.ndarray, b: Tokens, student_logprob: np.ndarray, least: float = 0.1) -> list[tuple[int, float, float]]:
    """(position before the last student token, the teacher's and the student's log-likelihood with the boundary), one answer with an end."""
    realised = logprobs[np.arange(len(logprobs)), a.ids[1:]]
    ours, theirs = begins_anew(teacher().vocabulary), begins_anew(student().vocabulary)
    at, found, so_far = 0, [], [0.0, 0.0]
    chunks = by_two_pointers(a, realised, b)
    ends_a = {int(a.end[i]): i for i in range(len(a)) if a.kind[i] == ANSWER}
    while at < len(chunks):
        begin, end, likelihood = chunks[at]
        so_far[0] += likelihood
        so_far[1] += sum(student_logprob[p, b.ids[p + 1]] for p in range(begin, end + 1))
        last = b.kind[end + 1] == END
        expected = 0.0 if last else np.log(np.exp(logprobs[ends_a[int(b.end[end + 1])], ours]).sum())
        if last or expected >= np.log(least):
            behind = 0.0 if last else np.log(np.exp(student_logprob[end + 1, theirs]).sum())
            found.append((end, so_far[0] + expected, so_far[1] + behind))
            so_far = [0.0, 0.0]
        at += 1
    return found


@pytest.mark.parametrize("record", RECORDS[:12], ids=lambda record: record.segments[-1].text[:20])
@pytest.mark.parametrize("seed", [0, 1])
def test_with_a_boundary_stretches_are_joined_until_one_is_expected_and_both_say_how_likely_it_is(record: Record, seed: int):
    a, b = teacher().render(record), student().render(record)
    targets, logprobs = with_boundary(a, seed)
    logits = torch.randn(len(b) - 1, len(student().vocabulary), generator=torch.Generator().manual_seed(seed)) * 2
    positions = b.answer_positions()
    chunks = joined([chunked(a, targets, b)], [positions], torch.from_numpy(begins_anew(student().vocabulary)))
    found = alm(logits[positions], torch.from_numpy(b.ids[positions + 1].astype(np.int64)), chunks, boundary=True)
    wanted = torch.zeros(len(positions), dtype=torch.float64)
    row_of = {int(position): row for row, position in enumerate(positions)}
    stretches = joined_by_loops(a, logprobs, b, logits.double().log_softmax(-1).numpy())
    for end, theirs, ours in stretches:
        wanted[row_of[end]] = reference(ours, theirs, 100.0)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=2e-3, atol=2e-3)
    if len(chunks.logprob) > 8:
        assert 1 < len(stretches) < len(chunks.logprob)


def test_a_teacher_that_is_its_own_student_is_as_likely_with_its_boundaries_and_control_another_predicate_is_not():
    tokens, vocabulary = teacher().render(RECORDS[0]), teacher().vocabulary
    targets, logprobs = with_boundary(tokens, 3)
    positions = tokens.answer_positions()
    logits, realised = torch.from_numpy(logprobs[positions]), torch.from_numpy(tokens.ids[positions + 1].astype(np.int64))
    begins = torch.from_numpy(begins_anew(vocabulary))
    chunks = joined([chunked(tokens, targets, tokens)], [positions], begins)
    assert alm(logits, realised, chunks, boundary=True).abs().max() < 1e-3
    assert alm(logits, realised, replace(chunks, begins_anew=~begins), boundary=True).abs().max() > 0.1


def test_two_records_in_a_batch_are_not_joined_and_a_cache_without_boundaries_is_an_error():
    records = [(teacher().render(record), student().render(record)) for record in RECORDS[:2]]
    begins = torch.from_numpy(begins_anew(student().vocabulary))
    parts = [chunked(a, with_boundary(a, seed)[0], b) for seed, (a, b) in enumerate(records)]
    positions = [b.answer_positions() for _, b in records]
    logits = torch.randn(sum(map(len, positions)), len(begins), generator=torch.Generator().manual_seed(0))
    realised = torch.from_numpy(np.concatenate([b.ids[where + 1] for (_, b), where in zip(records, positions, strict=True)]).astype(np.int64))
    both = alm(logits, realised, joined(parts, positions, begins), boundary=True)
    first = len(positions[0])
    alone = [alm(logits[part], realised[part], joined([parts[n]], [positions[n]], begins), boundary=True) for n, part in enumerate((slice(0, first), slice(first, None)))]
    torch.testing.assert_close(both, torch.cat(alone))
    without = joined([chunked(a, said(a)[0], b) for a, b in records], positions, begins)
    with pytest.raises(InputError, match="boundary: true"):
        alm(logits, realised, without, boundary=True)
