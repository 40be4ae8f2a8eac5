import numpy as np
import pytest
import torch

from pipeline.losses.attention_match import attention_match
from pipeline.signals.attention import Attended, AttentionTarget, Matched, attention_target


def target(weights: list[list[float]], rests: list[float], groups: int = 1) -> AttentionTarget:
    """Rows at positions 0, 1, ... of a batch of one record; each cell is one key."""
    sizes = np.array([len(row) for row in weights])
    position = np.arange(len(weights) // groups)
    flat = np.array([w for row in weights for w in row], np.float32)
    key = np.concatenate([np.arange(n) for n in sizes])
    record = Matched(position, sizes, flat, np.array(rests, np.float32), np.ones(len(flat), np.int64), key)
    return attention_target([record], [np.arange(len(position), dtype=np.int32)], 16, groups)


def attended(*pairs: tuple[AttentionTarget, list[float]], rows: int = 2) -> Attended:
    return Attended(rows, [(one, torch.tensor(mass, requires_grad=True)) for one, mass in pairs])


def test_the_squared_difference_over_kept_keys_and_the_rest_by_hand():
    one = target([[0.5, 0.2], [0.9]], [0.3, 0.1])
    found = attention_match(attended((one, [0.4, 0.4, 0.6]), rows=3))
    assert found.tolist() == pytest.approx([0.1**2 + 0.2**2 + 0.1**2, 0.3**2 + 0.3**2, 0.0], abs=1e-6)


def test_the_divergence_by_hand():
    one = target([[0.5, 0.2], [0.9]], [0.3, 0.1])
    found = attention_match(attended((one, [0.4, 0.4, 0.6])), form="kl")
    wanted = [0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.4) + 0.3 * np.log(0.3 / 0.2), 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("form", ["frobenius", "kl"])
def test_equal_rows_lose_nothing_and_layers_and_groups_are_averaged(form: str):
    one, two = target([[0.5, 0.2], [0.9]], [0.3, 0.1]), target([[0.1], [0.2, 0.3], [0.4], []], [0.9, 0.5, 0.6, 1.0], groups=2)
    pairs = ((one, [0.5, 0.2, 0.9]), (two, [0.1, 0.2, 0.3, 0.4]))
    assert attention_match(attended(*pairs), form=form).abs().max() < 1e-5
    off = ((one, [0.4, 0.3, 0.8]), (two, [0.3, 0.1, 0.3, 0.5]))
    both = attention_match(attended(*off), form=form)
    each = [attention_match(attended(pair), form=form) for pair in off]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_stored_weights_that_do_not_quite_sum_to_one_are_made_to_for_the_divergence():
    one = target([[0.5, 0.2]], [0.303])
    assert attention_match(attended((one, [0.5 / 1.003, 0.2 / 1.003]), rows=1), form="kl").item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", ["frobenius", "kl"])
@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], []])
def test_all_on_one_key_none_at_all_and_its_gradient(form: str, weights: list[float]):
    one = target([weights], [1 - sum(weights)])
    given = attended((one, [0.0] * len(weights)), rows=1)
    found = attention_match(given, form=form)
    assert found.isfinite().all()
    if weights:
        found.sum().backward()
        gradient = given.layers[0][1].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert (gradient[0] < 0) == (weights[0] > 0)


def test_control_without_the_rest_a_student_could_look_anywhere_else():
    one = target([[0.2]], [0.8])
    right, wrong = (attention_match(attended((one, [mass]), rows=1)).item() for mass in (0.2, 0.9))
    assert right < 1e-9
    assert wrong == pytest.approx(2 * 0.7**2)
