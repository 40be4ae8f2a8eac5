from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from pipeline.errors import NumericsError
from pipeline.models import teacher as module
from pipeline.models.heads import RowLogits, row_logits
from pipeline.models.teacher import Question, Tail, said_of
from pipeline.signals.records import Tokens
from pipeline.signals.selection import strongest, tail_sums
from pipeline.signals.targets import Targets
from tests.models.test_heads import llama
from tests.signals.dense import kept_of, log_softmax, log_sum, tokens_of

TEMPERATURES = [1.0, 2.0, 8.0]
QUESTION = Question(TEMPERATURES, threshold=0.01, least=2, most=12)
RECORDS = [tokens_of(list(range(1, n + 1)), answer_from=n // 3, ids=np.random.default_rng(n).integers(1, 70, n).tolist(), end=5) for n in (6, 40, 9, 31, 12, 33, 7)]


@cache
def a_teacher() -> RowLogits:
    return row_logits(llama(), "tiny", 70)


@cache
def direct(number: int) -> np.ndarray:
    """Dense log-probabilities of a record alone, unpadded."""
    with torch.inference_mode():
        return log_softmax(a_teacher().model(torch.from_numpy(RECORDS[number].ids.astype(np.int64))[None]).logits[0].double().numpy())


def parts(targets: Targets, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(targets.kept.astype(np.int64)))[:-1]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("batch_records", [1, 3])
def test_targets_are_those_of_each_record_alone_at_the_positions_that_were_asked_for(everywhere: bool, batch_records: int):
    said = said_of(a_teacher(), RECORDS, QUESTION, everywhere=everywhere, batch_records=batch_records)
    assert len(said) == len(RECORDS)
    for number, (tokens, targets) in enumerate(zip(RECORDS, said, strict=True)):
        wanted = np.arange(len(tokens) - 1) if everywhere else tokens.answer_positions()
        assert targets.position.tolist() == wanted.tolist()
        rows = direct(number)[targets.position]
        ids = [kept_of(row, 0.01, 2, 12) for row in rows]
        assert [part.tolist() for part in parts(targets, targets.ids)] == ids
        for row, kept, found, rests in zip(rows, ids, parts(targets, targets.logprobs), targets.rests.T, strict=True):
            np.testing.assert_allclose(found, row[kept], atol=1e-4)
            np.testing.assert_allclose(rests, [log_sum(np.delete(row, kept) / t) for t in TEMPERATURES], atol=0.01)
        np.testing.assert_allclose(targets.realised_logprob, rows[np.arange(len(rows)), tokens.ids[targets.position + 1]], atol=1e-4)
        assert targets.counts is targets.boundary is targets.hidden is None


def test_a_record_has_the_same_bits_whatever_its_batch_mates():
    together = said_of(a_teacher(), RECORDS, QUESTION, everywhere=False, batch_records=4)
    for tokens, targets in zip(RECORDS, together, strict=True):
        [alone] = said_of(a_teacher(), [tokens], QUESTION, everywhere=False, batch_records=4)
        for name, value in vars(targets).items():
            assert value is getattr(alone, name) is None or np.array_equal(value, getattr(alone, name)), name


class Watched(RowLogits):
    """Writes down the shapes that its bits can depend on."""

    def __init__(self) -> None:
        super().__init__(a_teacher().model, 70)
        self.bodies: set[tuple[int, ...]] = set()
        self.heads: set[tuple[int, int]] = set()

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        self.width = ids.shape[1]
        self.bodies.add(tuple(ids.shape))
        return super().hidden(ids)

    def head(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.heads.add((self.width, len(hidden)))
        return super().head(hidden, out)


def test_the_shapes_of_a_forward_pass_depend_on_the_records_length_alone():
    """In bfloat16 the bits depend on them: rows to a multiple of 32 tokens, always so many of them, and as many positions at once."""
    watched = Watched()
    for records in ([0], [0, 2], [0, 2, 4, 6], [1], [3, 5], [0, 2, 4, 6, 1, 3, 5]):
        said_of(watched, [RECORDS[i] for i in records], QUESTION, everywhere=False, batch_records=4)
    assert watched.bodies == {(4, 32), (4, 64)}
    assert sorted(width for width, _ in watched.heads) == [32, 64]  # for each width one number of positions


def test_chunks_of_positions_make_no_difference_beyond_rounding(monkeypatch: pytest.MonkeyPatch):
    question = replace(QUESTION, class_of=torch.arange(70) % 3, classes=3, hidden=True)
    whole = said_of(a_teacher(), RECORDS, question, everywhere=True, batch_records=3)
    monkeypatch.setattr(module, "positions_at_once", lambda size: 7)
    for one, other in zip(whole, said_of(a_teacher(), RECORDS, question, everywhere=True, batch_records=3), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        for name in ("logprobs", "rests", "realised_logprob", "entropy", "logsumexp", "boundary", "hidden_scale"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4)
        assert np.abs(one.hidden.astype(int) - other.hidden).max() <= 1


def test_classes_logsumexp_and_hidden_states_are_those_of_the_model():
    class_of = torch.from_numpy(np.random.default_rng(0).integers(0, 4, 70))
    said = said_of(a_teacher(), RECORDS, replace(QUESTION, class_of=class_of, classes=4, hidden=True), everywhere=False, batch_records=3)
    for number, (tokens, targets) in enumerate(zip(RECORDS, said, strict=True)):
        with torch.inference_mode():
            ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
            hidden = a_teacher().hidden(ids)[targets.position].numpy()
            logits = a_teacher().model(ids).logits[0, targets.position].double()
        p = np.exp(direct(number)[targets.position])
        np.testing.assert_allclose(np.exp(targets.boundary), np.stack([p[:, class_of.numpy() == i].sum(-1) for i in range(4)], -1), atol=1e-5)
        np.testing.assert_allclose(targets.logsumexp, logits.logsumexp(-1), atol=1e-4)
        assert (np.abs(targets.hidden * targets.hidden_scale[:, None] - hidden) <= targets.hidden_scale[:, None] * 0.51 + 1e-5).all()


def test_what_is_drawn_depends_on_the_record_alone():
    question = Question(TEMPERATURES, 0.0, 1, 20, draws=20)
    said = said_of(a_teacher(), RECORDS, question, everywhere=False, batch_records=3)
    backwards = said_of(a_teacher(), RECORDS[::-1], question, everywhere=False, batch_records=2)[::-1]
    for one, other in zip(said, backwards, strict=True):
        assert one.counts is not None
        assert one.counts.dtype == np.uint8
        assert one.ids.tolist() == other.ids.tolist()
        assert one.counts.tolist() == other.counts.tolist()
        assert [int(part.sum()) for part in parts(one, one.counts)] == [20] * len(one.position)
        assert (one.rests == -np.inf).all()
    # control: other tokens, other draws
    changed = replace(RECORDS[1], ids=np.where(np.arange(len(RECORDS[1])) == 1, 69, RECORDS[1].ids).astype(np.int32))
    assert said_of(a_teacher(), [changed], question, everywhere=False, batch_records=3)[0].counts.tolist() != said[1].counts.tolist()


def test_the_tail_is_the_mean_probability_of_what_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TAIL_EVERY", 1)
    tail = Tail(TEMPERATURES, 70, torch.device("cpu"))
    said = said_of(a_teacher(), RECORDS, QUESTION, everywhere=False, batch_records=3, tail=tail)
    sums, count = np.zeros((3, 70)), 0
    for number, targets in enumerate(said):
        for row, kept in zip(direct(number)[targets.position], parts(targets, targets.ids), strict=True):
            for i, temperature in enumerate(TEMPERATURES):
                p = np.exp(log_softmax(row, temperature))
                p[kept] = 0
                sums[i] += p
            count += 1
    means, positions = tail.log_means(75)
    assert positions == count
    assert means.shape == (3, 75)
    np.testing.assert_allclose(np.exp(means[:, :70]), sums / count, rtol=1e-3, atol=1e-9)
    assert (means[:, 70:] == -np.inf).all()


def test_the_tail_of_some_positions_is_over_as_many_as_it_says():
    tail = Tail(TEMPERATURES, 70, torch.device("cpu"))
    said = said_of(a_teacher(), RECORDS, QUESTION, everywhere=False, batch_records=3, tail=tail)
    means, positions = tail.log_means(70)
    whole = sum(len(targets.position) for targets in said)
    assert whole / module.TAIL_EVERY <= positions < whole / module.TAIL_EVERY + 3  # in each of three batches the first of every so many
    rests = np.concatenate([targets.rests[0] for targets in said])
    assert np.exp(means[0]).sum() == pytest.approx(np.exp(rests).mean(), rel=0.5)


class Breaks(RowLogits):
    """NaN wherever the state is that of one token at one place."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = super().hidden(ids).clone()
        hidden[(ids == 68).flatten()] = torch.nan
        return hidden


@pytest.mark.parametrize("at_once", [3, 10**6])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_logits_that_are_not_finite_are_an_error_with_the_record_and_the_position(number: int, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "positions_at_once", lambda size: at_once)
    records: list[Tokens] = list(RECORDS)
    position = int(records[number].answer_positions()[2])
    ids = np.where(records[number].ids == 68, 1, records[number].ids)
    ids[position] = 68
    records = [replace(tokens, ids=np.where(tokens.ids == 68, 1, tokens.ids).astype(np.int32)) for tokens in records]
    records[number] = replace(records[number], ids=ids.astype(np.int32))
    with pytest.raises(NumericsError) as error:
        said_of(Breaks(a_teacher().model, 70), records, QUESTION, everywhere=False, batch_records=3)
    assert error.value.args[1:] == (number, position)


def test_the_callers_check_is_made_after_every_batch():
    calls = []
    said_of(a_teacher(), RECORDS, QUESTION, everywhere=False, batch_records=3, after_batch=lambda: calls.append(1))
    assert len(calls) == 3  # four records of up to 32 tokens and three longer ones, three at once


def test_no_records_have_no_targets():
    assert said_of(a_teacher(), [], QUESTION, everywhere=False, batch_records=3) == []


def test_the_positions_whose_tails_are_summed_up_do_not_keep_time_with_the_answers():
    """Answers of two tokens: each second position is peaked. Every fourth position would always be of one kind."""
    logits = torch.randn(4000, 30, generator=torch.Generator().manual_seed(0))
    logits[::2, 0] += 12
    kept = strongest(logits, torch.zeros(4000, dtype=torch.int64), 0.0, 1, 1, [1.0, 8.0])
    tail, whole = Tail([1.0, 8.0], 30, torch.device("cpu")), torch.zeros(2, 30)
    tail.add(logits, kept, [1.0, 8.0])
    tail_sums(logits, kept, [1.0, 8.0], whole)
    means, positions = tail.log_means(30)
    assert positions == 500
    np.testing.assert_allclose(np.exp(means).sum(1), whole.sum(1).numpy() / 4000, rtol=0.1)
