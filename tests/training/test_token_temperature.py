import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.lookup import find
from pipeline.signals.projection import SparseTarget, at_temperature, together
from pipeline.training.token_temperature import CELLS, TokenTemperature
from tests.losses.test_forward_kl import a_target, some_logits
from tests.training.test_batches import STORED, examples

CPU = torch.device("cpu")


def adaptive(strength: float = 0.5, hottest: float = 8.0, rows: int = 0) -> TokenTemperature:
    """After a step whose distances were everywhere in the middle."""
    made = TokenTemperature(strength, hottest, CPU)
    made.state["distances"][CELLS // 2] = rows
    return made


def at(distances: list[float], base: float = 2.0, **how) -> list[float]:
    """Of rows of two outcomes whose Hellinger distance is so large."""
    p = torch.tensor([1 - (1 - d**2) ** 2 for d in distances])
    logits = torch.stack([(1 - p).log(), p.log()], -1).clamp(min=-80)  # against a teacher that is sure of the first
    teacher = SparseTarget(torch.zeros(len(p), 1, dtype=torch.int64), torch.ones(len(p), 1), torch.zeros(len(p)), 1.0)
    return adaptive(rows=9, **how).of_rows(logits, teacher, base).tolist()


def test_hard_tokens_have_a_lower_temperature_and_the_median_has_the_base():
    median = (CELLS // 2 + 0.5) / CELLS
    easy, middle, hard = at([0.05, median, 0.95])
    assert middle == pytest.approx(2.0, rel=1e-3)
    assert hard < middle < easy
    relative = 0.95 / median
    assert hard == pytest.approx(2 * np.exp(-0.5 * (relative**2 - 1) / (relative**2 + 1)), rel=1e-3)  # tanh(log x)
    assert at([0.0])[0] == pytest.approx(2 * np.exp(0.5), rel=1e-3)


def test_never_below_1_nor_above_what_the_cache_has():
    assert at([0.99], base=1.0) == [1.0]
    assert at([0.0], base=2.0, hottest=2.5) == [2.5]


def test_the_first_step_has_the_base_and_the_next_the_median_of_it():
    made = TokenTemperature(0.5, 8.0, CPU)
    logits, teacher = some_logits(0, 5, 30, 3.0), a_target(0, 5, 30, 6, 1.0, "some")
    assert made.of_rows(logits, teacher, 3.0).tolist() == [3.0] * 5
    made.step(Accelerator(cpu=True))
    assert made.state["distances"].sum() == 5
    assert len(set(made.of_rows(logits, teacher, 3.0).tolist())) > 1


def test_control_the_other_way_round_is_caught():
    easy, hard = at([0.05, 0.95], strength=-0.5)
    with pytest.raises(AssertionError):
        assert hard < easy


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99))
def test_targets_at_a_temperature_for_each_row_are_those_at_that_temperature(seed: int):
    _, words = examples()
    whole = together(words)
    rows = len(whole.entries)
    temperature = np.random.default_rng(seed).choice([1.0, 1.3, 2.0, 5.0, 8.0], rows)
    found = at_temperature([whole], STORED, temperature)
    for value in np.unique(temperature):
        alone = at_temperature([whole], STORED, float(value))
        those = torch.from_numpy(temperature == value)
        for name in ("ids", "probs", "rest"):
            torch.testing.assert_close(getattr(found, name)[those], getattr(alone, name)[those], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "adaptive_kl", "total_variation", "uld"])
def test_a_loss_with_a_temperature_for_each_row_is_that_of_each_row_alone(name: str):
    temperatures = [1.0, 2.0, 4.0, 8.0]
    logits, targets = some_logits(1, 4, 30, 3.0), [a_target(1, 4, 30, 6, temperature, "some") for temperature in temperatures]
    joined = SparseTarget(*(torch.stack([getattr(target, part)[row] for row, target in enumerate(targets)]) for part in ("ids", "probs", "rest")), torch.tensor(temperatures))
    found = find("losses", name)(logits, joined)
    torch.testing.assert_close(found, torch.stack([find("losses", name)(logits, target)[row] for row, target in enumerate(targets)]))


def test_the_rows_of_a_record_are_cut_out_whole():
    _, words = examples()
    whole = together(words)
    begin = 0
    for word in words:
        part = whole.rows(slice(begin, begin + len(word.entries)))
        begin += len(word.entries)
        for name in ("entries", "student_id", "logprobs", "unkept", "reliability", "rests"):
            np.testing.assert_array_equal(getattr(part, name), getattr(word, name))
