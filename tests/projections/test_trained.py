"""What is trained: `learned` and `low_rank`, against dense float64 references, and that they learn what there is to be learned."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import InputError, NumericsError
from pipeline.projections.learned import SharesGivenBefore
from pipeline.projections.low_rank import Bottleneck
from pipeline.signals.counts import Counts
from pipeline.signals.fitting import Batch, Layer, Places, fit
from pipeline.signals.projection import REST, Meeting, at_temperature, meet
from pipeline.signals.targets import with_realised
from tests.projections.made import RECORDS, TEMPERATURES, build, counts_of, dense, put, said, shaken, sides, untrained
from tests.signals.dense import log_softmax

ONE, OTHER = sides("tiny")
SIZES = len(ONE.vocabulary), len(OTHER.vocabulary)


def meeting_of(index: int, keep: int = 16) -> Meeting:
    record = RECORDS[index]
    tokens = ONE.render(record)
    targets = said(ONE, record, keep, index).targets
    return meet(record.content, tokens, with_realised(targets, tokens.ids[targets.position + 1], TEMPERATURES), OTHER.render(record))


def batch_of(meetings: list[Meeting]) -> Batch:
    places = Places.joined(Places.of(meeting) for meeting in meetings)
    (batch,) = Places.batches(places, np.arange(min(len(places.kept), 60)))
    return batch


def dense_shares(layer: SharesGivenBefore, matrix: Any, teacher_id: int, before: int) -> dict[int, float]:
    """Student token (or REST) -> share."""
    edges = range(int(matrix.begin[teacher_id]), int(matrix.begin[teacher_id + 1]))
    to = [int(matrix.student_id[edge]) for edge in edges]
    weight, u, v = (tensor.detach().double().numpy() for tensor in (layer.share, layer.before.weight, layer.token))
    logits = np.array([weight[edge] + u[before] @ v[id if id != REST else SIZES[1]] for edge, id in zip(edges, to, strict=True)])
    return dict(zip(to, np.exp(log_softmax(logits[None], 1.0))[0].tolist(), strict=True))


# --- learned ---


def test_places_are_what_the_teacher_says_and_the_student_has_where_both_begin_a_token():
    meeting = meeting_of(0)
    places = Places.of(meeting)
    assert len(places.kept) == len(meeting.row) > 3
    at = 0
    for i, (row, position) in enumerate(zip(meeting.row.tolist(), meeting.at_student.tolist(), strict=True)):
        there = slice(meeting.first[row], meeting.first[row + 1])
        assert places.teacher_id[at : at + places.kept[i]].tolist() == meeting.targets.ids[there].tolist()
        assert places.logprob[at : at + places.kept[i]].tolist() == meeting.targets.logprobs[there].tolist()
        assert places.before[i] == meeting.teacher.ids[meeting.targets.position[row]]
        assert places.student_id[i] == meeting.student.ids[position + 1]
        at += places.kept[i]
    order = np.random.default_rng(0).permutation(len(places.kept))
    whole = [id for batch in places.batches(order) for id in batch.student_id.tolist()]
    assert whole == places.student_id[order].tolist()


def test_untrained_it_is_count_transport():
    counts = counts_of("tiny")
    learned, counted = (build(method, ONE, OTHER, counts, untrained) for method in ("learned", "count_transport"))
    for record in RECORDS[:3]:
        targets = said(ONE, record, 16, 0).targets
        one, two = (dense(at_temperature([put(method, ONE, OTHER, record, targets)], TEMPERATURES, 2.0), SIZES[1]) for method in (learned, counted))
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("least_share", [0.0, 0.001, 0.2])
def test_shares_given_the_token_before_are_those_of_plain_loops(least_share: float):
    method = build("learned", ONE, OTHER, counts_of("tiny"), shaken, least_share=least_share)
    meeting = meeting_of(0)
    found = method.shares(meeting)
    for place, row in enumerate(meeting.row.tolist()):
        before = int(meeting.teacher.ids[meeting.targets.position[row]])
        for kept in range(meeting.first[row], meeting.first[row + 1]):
            wanted = dense_shares(method.layer, method.matrix, int(meeting.targets.ids[kept]), before)
            large = {to: share for to, share in wanted.items() if to != REST and share >= least_share}
            here = (found.owner == place) & (found.kept == kept)
            there = dict(zip(found.student_id[here].tolist(), np.exp(found.log_share[here].astype(np.float64)).tolist(), strict=True))
            assert there.pop(REST, 0.0) == pytest.approx(1 - sum(large.values()), abs=1e-5)
            assert there == pytest.approx(large, rel=1e-4)


def test_the_likelihood_is_that_of_plain_loops():
    layer = build("learned", ONE, OTHER, counts_of("tiny"), shaken).layer
    matrix = build("learned", ONE, OTHER, counts_of("tiny"), untrained).matrix
    batch = batch_of([meeting_of(0), meeting_of(2)])
    usual = np.bincount(counts_of("tiny").student_id, counts_of("tiny").count, SIZES[1]) + 1
    wanted, at = [], 0
    for n, before, id in zip(batch.kept.tolist(), batch.before.tolist(), batch.student_id.tolist(), strict=True):
        p = batch.p[at : at + n].double().numpy()
        mass = sum(q * dense_shares(layer, matrix, t, before).get(id, 0.0) for t, q in zip(batch.teacher_id[at : at + n].tolist(), p.tolist(), strict=True))
        wanted.append(-np.log(mass + max(1 - p.sum(), 1e-6) * usual[id] / usual.sum()))
        at += n
    np.testing.assert_allclose(layer.nll(batch).detach().numpy(), wanted, rtol=1e-3)


def world(places: int) -> tuple[Places, Counts]:
    """Of 3 teacher and 4 student tokens: token 2 is student token 2 after token 0 and student token 3 after token 1. The teacher is sure."""
    before = np.random.default_rng(0).integers(0, 2, places).astype(np.int32)
    ids = np.full(places, 2, np.int32)
    student_id = before + 2
    counts = Counts.of_pairs(ids, student_id, np.ones(places, np.int64), 3)
    return Places(np.ones(places, np.int64), ids, np.full(places, np.log(0.99), np.float32), before, student_id), counts


def some(places: Places, rows: slice) -> Places:
    """Of a world, where one token a place is kept."""
    return Places(*(column[rows] for column in (places.kept, places.teacher_id, places.logprob, places.before, places.student_id)))


def halves(places: Places) -> tuple[Places, Places]:
    """To train on, and held out."""
    most = len(places.kept) * 9 // 10
    return some(places, slice(0, most)), some(places, slice(most, None))


def layers() -> list[tuple[str, Layer]]:
    _, counts = world(1000)
    torch.manual_seed(0)
    matrix = counts.matrix(np.array([0, 1, 2], np.int32), 5, 0.0)
    return [("learned", SharesGivenBefore(matrix, counts, 3, 4, 4)), ("low_rank", Bottleneck(counts, 3, 4, 8))]


def test_what_the_token_before_tells_is_learned_and_every_parameter_moves():
    places, _ = world(1000)
    (_, layer), _ = layers()
    begun = {name: value.detach().clone() for name, value in layer.named_parameters()}
    told = fit(layer, *halves(places), epochs=30, learning_rate=0.05, seed=0)
    assert told["nats_before"] == pytest.approx(np.log(2), abs=0.02)
    assert told["nats_after"] < 0.05
    assert (told["places"], told["held_out_places"]) == (900, 100)
    for name, value in layer.named_parameters():
        assert not torch.equal(value, begun[name]), name


def test_a_layer_through_a_bottleneck_moves_every_parameter_too():
    places, _ = world(1000)
    _, (_, layer) = layers()
    begun = {name: value.detach().clone() for name, value in layer.named_parameters()}
    told = fit(layer, *halves(places), epochs=3, learning_rate=0.05, seed=0)
    assert told["nats_after"] < told["nats_before"]
    for name, value in layer.named_parameters():
        assert not torch.equal(value, begun[name]), name


def test_control_a_parameter_that_has_no_part_is_an_error():
    class Apart(SharesGivenBefore):
        """The published fault: a layer that nothing trains."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.unused = nn.Parameter(torch.ones(3))

    places, counts = world(1000)
    layer = Apart(counts.matrix(np.array([0, 1, 2], np.int32), 5, 0.0), counts, 3, 4, 4)
    with pytest.raises(RuntimeError, match="unused"):
        fit(layer, *halves(places), epochs=1, learning_rate=0.05, seed=0)


@pytest.mark.parametrize("which", [0, 1])
def test_the_best_epoch_on_held_out_places_is_kept_and_training_is_the_same_each_time(which: int):
    places, _ = world(300)
    _, first = layers()[which]
    before = {name: value.clone() for name, value in first.state_dict().items()}
    fit(first, *halves(places), epochs=4, learning_rate=0.05, seed=0)
    _, again = layers()[which]
    fit(again, *halves(places), epochs=4, learning_rate=0.05, seed=0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    _, worse = layers()[which]
    # what is held out contradicts what is trained on
    turned = Places(places.kept, places.teacher_id, places.logprob, places.before, np.where(np.arange(300) < 270, places.student_id, 5 - places.student_id).astype(np.int32))
    told = fit(worse, *halves(turned), epochs=4, learning_rate=0.5, seed=0)
    assert told["nats_after"] <= told["nats_before"]
    if told["nats_after"] == told["nats_before"]:
        assert all(torch.equal(value, before[name]) for name, value in worse.state_dict().items())


@pytest.mark.parametrize("which", [0, 1])
def test_training_goes_on_from_any_epoch_as_if_it_had_not_been_interrupted(which: int):
    places, _ = world(300)
    places = replace(places, teacher_id=places.teacher_id - which * places.before)  # the bottleneck does not see what is before
    _, whole = layers()[which]
    states: dict[int, dict[str, torch.Tensor]] = {}
    told = fit(whole, *halves(places), epochs=4, learning_rate=0.02, seed=0, after_epoch=lambda epoch, state: states.update({epoch: {name: value.clone() for name, value in state.items()}}))
    assert sorted(states) == [1, 2, 3, 4]
    for epoch, state in states.items():
        _, layer = layers()[which]
        assert fit(layer, *halves(places), epochs=4, learning_rate=0.02, seed=0, begun=state) == told
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in layer.state_dict().items()), epoch
    _, layer = layers()[which]
    without = {name: value for name, value in states[2].items() if not name.startswith("optimizer.")}
    fit(layer, *halves(places), epochs=4, learning_rate=0.02, seed=0, begun=without)
    assert not all(torch.equal(value, whole.state_dict()[name]) for name, value in layer.state_dict().items())  # control


def test_what_is_held_out_is_not_trained_on():
    places, _ = world(300)
    ours, held_out = halves(places)
    one, other = layers()[0][1], layers()[0][1]
    fit(one, ours, held_out, epochs=2, learning_rate=0.05, seed=0)
    # other tokens, and the same epochs kept: what is kept says only how long
    fit(other, ours, some(ours, slice(0, 30)), epochs=2, learning_rate=0.05, seed=0)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_too_few_places_and_numbers_that_are_none_are_told():
    places, _ = world(5)
    with pytest.raises(InputError, match="Choose `contextual`"):
        fit(layers()[0][1], places, some(places, slice(0, 0)), epochs=1, learning_rate=0.05, seed=0)
    many, _ = world(200)
    with pytest.raises(NumericsError, match="lower projection"):
        fit(layers()[1][1], *halves(many), epochs=3, learning_rate=1e30, seed=0)


# --- low_rank ---


def dense_word(layer: Bottleneck, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
    """float64 [V_student] logits of one place."""
    inner, a, outer, b = (tensor.detach().double().numpy() for tensor in (layer.inner.weight, layer.inner_bias, layer.outer, layer.outer_bias))
    given = np.zeros(SIZES[0])
    np.add.at(given, ids, p)
    return np.maximum(given @ inner + a, 0) @ outer.T + b


def test_through_the_bottleneck_it_is_the_dense_layer():
    layer = build("low_rank", ONE, OTHER, counts_of("tiny"), shaken).layer
    batch = batch_of([meeting_of(0), meeting_of(2)])
    found, at = layer.nll(batch).detach().numpy(), 0
    for i, (n, id) in enumerate(zip(batch.kept.tolist(), batch.student_id.tolist(), strict=True)):
        logits = dense_word(layer, batch.teacher_id[at : at + n].numpy(), batch.p[at : at + n].double().numpy())
        assert found[i] == pytest.approx(-log_softmax(logits[None], 1.0)[0, id], rel=1e-4, abs=1e-4)
        at += n


@pytest.mark.parametrize("keep", [1, 8, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_what_is_kept_of_its_word_and_the_rest_are_its_distribution_at_a_temperature(keep: int, temperature: float):
    method = build("low_rank", ONE, OTHER, counts_of("tiny"), shaken, keep=keep)
    meeting = meeting_of(0)
    q = dense(at_temperature([method.values(meeting, TEMPERATURES)], TEMPERATURES, temperature), SIZES[1])
    for i, row in enumerate(meeting.row.tolist()):
        there = slice(meeting.first[row], meeting.first[row + 1])
        wanted = np.exp(log_softmax(dense_word(method.layer, meeting.targets.ids[there], np.exp(meeting.targets.logprobs[there].astype(np.float64)))[None], temperature))[0]
        kept = np.argsort(-wanted)[:keep]
        assert q[i].sum() == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(q[i][kept], wanted[kept], rtol=2e-3, atol=1e-6)
        assert q[i][-1] == pytest.approx(1 - wanted[kept].sum(), abs=1e-4)


def test_what_it_makes_of_a_token_alone_is_its_strongest_and_of_one_never_seen_none():
    method = build("low_rank", ONE, OTHER, counts_of("tiny"), shaken)
    seen = counts_of("tiny").total > 0
    assert (method.student_id[~seen] == REST).all()
    assert seen.sum() > 50
    for id in np.flatnonzero(seen)[::9].tolist():
        assert method.student_id[id] == dense_word(method.layer, np.array([id]), np.ones(1)).argmax()


def test_a_record_where_nothing_meets_has_no_word():
    method = build("low_rank", ONE, OTHER, counts_of("tiny"), shaken)
    meeting = meeting_of(0)
    none = Meeting(meeting.content, meeting.teacher, meeting.student, meeting.targets, meeting.row[:0], meeting.at_student[:0])
    word = method.values(none, TEMPERATURES)
    assert len(word.position) == len(word.student_id) == 0
    assert word.rests.shape == (3, 0)
