import pytest

from pipeline.training.schedules import learning_rate_at, value_at

MIDDLE = {"constant": 8.0, "linear": 5.0, "exponential": 4.0, "cosine": 5.0}
QUARTER = {"constant": 8.0, "linear": 6.5, "exponential": 32**0.5, "cosine": 5 + 3 * 2**-0.5}


@pytest.mark.parametrize("schedule", MIDDLE)
def test_a_schedule_has_its_ends_its_middle_and_its_quarter(schedule: str):
    """From 8 to 2 over 101 steps."""
    at = [value_at(step, 101, 8.0, 2.0, schedule) for step in range(101)]
    assert at[0] == 8.0
    assert at[25] == pytest.approx(QUARTER[schedule])
    assert at[50] == pytest.approx(MIDDLE[schedule])
    assert at[100] == pytest.approx(8.0 if schedule == "constant" else 2.0)
    assert at == sorted(at, reverse=True)


@pytest.mark.parametrize("schedule", MIDDLE)
def test_a_schedule_rises_as_it_falls(schedule: str):
    at = [value_at(step, 11, 2.0, 8.0, schedule) for step in range(11)]
    assert at[0] == pytest.approx(2.0)
    assert at[-1] == pytest.approx(2.0 if schedule == "constant" else 8.0)
    assert at == sorted(at)


def test_each_schedule_is_another():
    assert len({round(value_at(2, 11, 8.0, 2.0, schedule), 6) for schedule in MIDDLE}) == 4


@pytest.mark.parametrize("schedule", MIDDLE)
def test_one_step_has_the_start(schedule: str):
    assert value_at(0, 1, 8.0, 2.0, schedule) == pytest.approx(8.0)


@pytest.mark.parametrize("schedule", MIDDLE)
def test_the_learning_rate_rises_over_the_warmup_and_then_follows_its_schedule(schedule: str):
    at = [learning_rate_at(step, 30, 10, 1.0, 0.1, schedule) for step in range(30)]
    assert at[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert at[10:] == pytest.approx([value_at(step, 20, 1.0, 0.1, schedule) for step in range(20)])
    assert at[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert 0 not in at


def test_without_a_warmup_the_first_step_is_at_the_start():
    assert learning_rate_at(0, 10, 0, 1.0, 0.1, "cosine") == 1.0
    assert learning_rate_at(9, 10, 0, 1.0, 0.1, "cosine") == pytest.approx(0.1)


def test_a_warmup_longer_than_the_training_never_gets_beyond_its_rise():
    assert [learning_rate_at(step, 3, 10, 1.0, 0.1, "linear") for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate_at(9, 10, 10, 1.0, 0.1, "linear") == 1.0
