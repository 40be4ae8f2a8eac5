import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.signals.projection import SparseTarget
from pipeline.signals.tail import student_sums
from pipeline.training.calibration import Calibration

STORED = [1.0, 2.0]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def made(seed: int, rows: int = 6) -> tuple[torch.Tensor, SparseTarget]:
    generator = torch.Generator().manual_seed(seed)
    probs, ids = torch.randn(rows, 20, generator=generator).softmax(-1).topk(3)
    return torch.randn(rows, 20, generator=generator), SparseTarget(ids, probs, 1 - probs.sum(-1), 1.0)


def calibration() -> Calibration:
    return Calibration(np.log(np.random.default_rng(0).dirichlet(np.ones(20), 2)), STORED, torch.device("cpu"))


def test_before_the_first_step_the_ratio_is_one():
    assert torch.equal(calibration().log_ratio(), torch.zeros(20))


def test_a_step_counts_whole_however_it_is_split(accelerator: Accelerator):
    logits, target = made(0)
    whole, split = calibration(), calibration()
    whole.add(logits, target)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        split.add(logits[part], SparseTarget(target.ids[part], target.probs[part], target.rest[part], 1.0))
    assert torch.equal(split.log_ratio(), torch.zeros(20))  # the running step is not in it
    whole.step(1.0, accelerator)
    split.step(1.0, accelerator)
    torch.testing.assert_close(whole.log_ratio(), split.log_ratio())
    torch.testing.assert_close(whole.state["student"], student_sums(logits, target) / 6)
    assert float(whole.log_ratio().abs().max()) > 0


def test_a_step_without_a_word_of_the_teacher_changes_nothing(accelerator: Accelerator):
    one = calibration()
    one.step(1.0, accelerator)
    assert one.state["steps"].item() == 0


def test_an_average_of_few_positions_counts_little(accelerator: Accelerator):
    few, many = calibration(), calibration()
    few.add(*made(0))
    few.step(1.0, accelerator)
    for _ in range(200):
        many.add(*made(0))
    many.step(1.0, accelerator)
    torch.testing.assert_close(few.log_ratio() * (506 / 6), many.log_ratio() * (1700 / 1200), rtol=1e-3, atol=1e-5)


def test_teacher_and_student_are_averaged_alike_over_temperatures(accelerator: Accelerator):
    one = calibration()
    for temperature in (2.0, 2.0, 1.0):
        one.add(*made(1))
        one.step(temperature, accelerator)
    means = np.exp(np.log(np.random.default_rng(0).dirichlet(np.ones(20), 2)))
    np.testing.assert_allclose(one.state["teacher"].numpy(), (2 * means[1] + means[0]) / 3, rtol=1e-5)
