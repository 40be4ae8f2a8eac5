import pytest
import torch

from pipeline.training.specialties import Specialties

RECORDS = ["eye"] * 6 + ["heart"] * 3 + [""]
CPU = torch.device("cpu")


def sums(*losses: float | None) -> torch.Tensor:
    """One part's, of two rows each; None: not in the step."""
    return torch.tensor([[[0.0, 0.0] if loss is None else [2 * loss, 2.0] for loss in losses]])


def mean(specialties: Specialties) -> float:
    of = dict(zip(specialties.names, specialties.factors().tolist(), strict=True))
    return sum(of[name] for name in RECORDS) / len(RECORDS)


def test_given_weights_are_taken_and_1_for_the_others():
    specialties = Specialties(RECORDS, {"eye": 2.0, "": 0.5}, CPU)
    assert dict(zip(specialties.names, specialties.factors().tolist(), strict=True)) == {"": 0.5, "eye": 2.0, "heart": 1.0}
    assert not specialties.state


def test_balanced_all_specialties_weigh_the_same_together():
    specialties = Specialties(RECORDS, "inverse_frequency", CPU)
    assert mean(specialties) == pytest.approx(1)
    of = dict(zip(specialties.names, specialties.factors().tolist(), strict=True))
    assert of["eye"] * 6 == pytest.approx(of["heart"] * 3) == pytest.approx(of[""])


def test_by_loss_the_weight_follows_the_average_loss_with_a_mean_of_1():
    specialties = Specialties(RECORDS, "current_loss", CPU)
    assert specialties.factors().tolist() == [1.0, 1.0, 1.0]
    assert specialties.step(sums(None, 1.0, 3.0)) == {"eye": 1.0, "heart": 3.0}
    none, eye, heart = specialties.factors().tolist()
    assert none == 1.0
    assert heart == pytest.approx(3 * eye)
    assert mean(specialties) == pytest.approx(1)
    specialties.step(sums(None, None, 1.0))  # an average of two steps now
    _, eye, heart = specialties.factors().tolist()
    assert heart == pytest.approx(2 * eye)


def test_its_state_is_all_that_goes_on():
    one, other = (Specialties(RECORDS, "current_loss", CPU) for _ in range(2))
    one.step(sums(1.0, 2.0, None))
    for name, value in one.state.items():
        other.state[name].copy_(value)
    for specialties in (one, other):
        specialties.step(sums(3.0, None, 5.0))
    assert torch.equal(one.factors(), other.factors())


def test_a_loss_of_nothing_weighs_as_the_average():
    specialties = Specialties(RECORDS, "current_loss", CPU)
    specialties.step(sums(0.0, 0.0, 0.0))
    assert specialties.factors().tolist() == [1.0, 1.0, 1.0]
