"""What a scorer says of the cached teacher, against what `inspect` shows of the cache."""

import numpy as np
import pytest

from pipeline.cache.reader import Cache
from pipeline.models.scoring import BINS, CachedTeacher, _certainty
from pipeline.reporting.inspection import record
from tests.conftest import Place


def test_the_cached_teachers_certainty_is_that_of_its_strongest_tokens(done: Place):
    finished = done.finished("cache-teacher")
    examples = [example for example in Cache(finished.file, ("entropy",)).examples("heldout") if not example.record.choice_of]
    scores = CachedTeacher(examples).scores([example.record for example in examples])
    assert scores
    for example, score in zip(examples, scores, strict=True):
        wanted = np.zeros((BINS, 4))
        for row in record(finished.path, example.record.id)["positions"]:
            probability = float(np.exp(np.float64(row["kept_logprobs"][0])))
            follows = row["kept_ids"][0] == row["realised_id"]
            wanted[min(int(probability * BINS), BINS - 1)] += 1, probability, follows, (probability - follows) ** 2
        assert score.certainty is not None
        np.testing.assert_allclose(score.certainty, wanted, atol=1e-5)
        assert score.certainty[:, 0].sum() == score.tokens


def test_each_position_is_in_the_bin_of_its_probability_and_of_its_record():
    probability = np.array([0.0, 0.0667, 0.9999, 1.0, 1.0000001])
    found = _certainty(probability, np.array([True, False, True, True, False]), np.array([0, 0, 1, 1, 1]), 3)
    assert found.shape == (3, BINS, 4)
    assert found[0, 0].tolist() == [1, 0, 1, 1]
    assert found[0, 1].tolist() == [1, 0.0667, 0, 0.0667**2]
    assert found[1, BINS - 1].tolist() == pytest.approx([3, probability[2:].sum(), 2, 1.0], rel=1e-3)
    assert found[:, :, :3].sum((0, 1)) == pytest.approx([5, probability.sum(), 3])
