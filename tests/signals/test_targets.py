import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.signals.selection import strongest
from pipeline.signals.targets import rest_at, with_realised
from tests.signals.dense import log_softmax, log_sum, targets_of, tokens_of

TEMPERATURES = [1.0, 2.0, 8.0]


# --- the rest at any temperature ---


def a_rest(seed: int, outside: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the tokens outside the kept ones, [P, outside], and the rests at TEMPERATURES."""
    logprobs = log_softmax(np.random.default_rng(seed).normal(0, spread, (6, outside + 20)))
    outside_ones = np.sort(logprobs, axis=-1)[:, :outside]
    return outside_ones, np.array([[log_sum(row / t) for row in outside_ones] for t in TEMPERATURES], np.float32)


def test_the_rest_is_exact_at_stored_temperatures():
    _, rests = a_rest(0, 1000, 3.0)
    for i, temperature in enumerate(TEMPERATURES):
        assert (rest_at(rests, TEMPERATURES, np.full(6, 1000), temperature) == rests[i].astype(np.float64)).all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), outside=st.sampled_from([1, 5, 1000, 20000]), spread=st.sampled_from([0.5, 2.0, 3.0]), temperature=st.floats(1.0, 20.0))
def test_the_rest_between_stored_temperatures_is_near_the_true_one(seed, outside, spread, temperature):
    logprobs, rests = a_rest(seed, outside, spread)
    true = np.array([log_sum(row / temperature) for row in logprobs])
    found = rest_at(rests, TEMPERATURES, np.full(len(rests[0]), outside), temperature)
    np.testing.assert_allclose(found, true, atol=TOLERANCE)


TOLERANCE = 0.03
"""Nats, for logits with a spread up to 3 and the default temperatures; up to 0.13 for a spread of 6. Stored [1.0] alone: 1 to 3."""


def test_the_rest_rises_with_the_temperature():
    _, rests = a_rest(5, 5000, 3.0)
    found = [rest_at(rests, TEMPERATURES, np.full(6, 5000), t) for t in np.geomspace(1, 50, 60)]
    assert (np.diff(found, axis=0) > 0).all()
    assert (found[-1] < np.log(5000)).all()


def test_control_a_rest_on_a_line_between_two_temperatures_is_further_off_than_the_tolerance():
    logprobs, rests = a_rest(5, 5000, 3.0)
    true = np.array([log_sum(row / 4.0) for row in logprobs])
    line = rests[1] + (rests[2] - rests[1]) * (4.0 - 2.0) / (8.0 - 2.0)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(line, true, atol=TOLERANCE)


def test_nothing_unkept_has_no_mass_at_any_temperature():
    rests = np.full((3, 2), -np.inf, np.float32)
    for temperature in (1.0, 1.3, 2.0, 5.0, 100.0):
        assert (rest_at(rests, TEMPERATURES, np.array([0, 0]), temperature) == -np.inf).all()


def test_masked_tokens_outside_have_no_mass_at_any_temperature():
    rests = np.full((3, 2), -np.inf, np.float32)
    for temperature in (1.0, 1.3, 3.0, 5.0, 7.0):
        assert (np.exp(rest_at(rests, TEMPERATURES, np.array([5, 100000]), temperature)) < 1e-12).all()


def test_a_rest_too_faint_for_float32_at_temperature_1_stays_faint_between_the_stored_ones():
    logits = torch.full((1, 50000), -120.0)
    logits[0, :4] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    kept = strongest(logits, torch.tensor([0]), 0.0, 4, 4, TEMPERATURES)
    logprobs = log_softmax(logits.double().numpy())[0, 4:]
    for temperature in (1.5, 3.0, 4.0, 6.0):
        found = rest_at(kept.rests.numpy(), TEMPERATURES, np.array([49996]), temperature)
        assert found[0] <= log_sum(logprobs / temperature) + 1


# --- the realised token ---


def three_positions(keep: int, seed: int = 0):
    tokens = tokens_of([1, 2, 3], 0, ids=[7, 30, 5], end=39)
    position = tokens.answer_positions()
    logits = np.random.default_rng(seed).normal(0, 3, (len(position), 40))
    return tokens, targets_of(logits, tokens, position, keep, TEMPERATURES), logits


def mass(targets, i: int, temperature: float) -> float:
    owner = np.repeat(np.arange(len(targets.kept)), targets.kept)
    return float(np.exp(targets.logprobs[owner == i].astype(np.float64) / temperature).sum() + np.exp(np.float64(targets.rests[TEMPERATURES.index(temperature), i])))


@pytest.mark.parametrize("keep", [1, 3, 20, 40])
def test_adding_the_realised_token_conserves_the_mass_at_every_temperature(keep):
    tokens, before, _ = three_positions(keep)
    realised = tokens.ids[before.position + 1]
    after = with_realised(before, realised, TEMPERATURES)
    owner = np.repeat(np.arange(len(after.kept)), after.kept)
    for i, id in enumerate(realised):
        assert (after.ids[owner == i] == id).sum() == 1
        for temperature in TEMPERATURES:
            assert mass(after, i, temperature) == pytest.approx(mass(before, i, temperature), rel=1e-5)


def test_adding_the_realised_token_to_what_is_kept_gives_the_dense_rest():
    tokens, before, logits = three_positions(3)
    after = with_realised(before, tokens.ids[before.position + 1], TEMPERATURES)
    owner = np.repeat(np.arange(len(after.kept)), after.kept)
    for i, row in enumerate(log_softmax(logits)):
        outside = np.delete(row, after.ids[owner == i])
        np.testing.assert_allclose(after.rests[:, i], [log_sum(outside / t) for t in TEMPERATURES], rtol=1e-4, atol=1e-4)


def test_control_a_realised_token_added_without_taking_it_from_the_rest_is_caught():
    tokens, before, _ = three_positions(3)
    after = with_realised(before, tokens.ids[before.position + 1], TEMPERATURES)
    added = [i for i in range(len(before.kept)) if after.kept[i] > before.kept[i]]
    assert added
    owner = np.repeat(np.arange(len(after.kept)), after.kept)
    wrong = [np.exp(after.logprobs[owner == i].astype(np.float64)).sum() + np.exp(before.rests[0, i]) for i in added]
    assert wrong != pytest.approx([mass(before, i, 1.0) for i in added], rel=1e-5)


def test_nothing_changes_where_the_realised_token_is_kept_already():
    tokens, before, _ = three_positions(40)
    assert with_realised(before, tokens.ids[before.position + 1], TEMPERATURES) is before


def test_a_realised_token_that_is_all_of_the_rest_leaves_none_of_it():
    tokens = tokens_of([1], 0, ids=[2], end=0)
    position = tokens.answer_positions()[:1]
    before = targets_of(np.array([[1.0, 0.5, 0.0]]), tokens, position, 2, TEMPERATURES)
    after = with_realised(before, tokens.ids[position + 1], TEMPERATURES)
    assert after.ids.tolist() == [0, 1, 2]
    assert (np.exp(after.rests) < 1e-6).all()
