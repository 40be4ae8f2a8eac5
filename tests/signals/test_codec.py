import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.signals.codec import LOGPROB_ERROR, SMALLEST, decode_logprobs, encode_logprobs


def there_and_back(logprobs: np.ndarray) -> np.ndarray:
    return decode_logprobs(encode_logprobs(logprobs))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-60000, 0, width=32), min_size=1, max_size=50))
def test_a_logprob_there_and_back_differs_by_the_stated_share_at_most(values):
    logprobs = np.array(values, np.float32)
    found = there_and_back(logprobs)
    assert found.dtype == np.float32
    assert (np.abs(found - logprobs) <= np.maximum(LOGPROB_ERROR * np.abs(logprobs), 2.0**-25)).all()


def test_the_error_in_nats_at_minus_16_is_what_the_module_says():
    logprobs = -np.linspace(8, 16, 10001, dtype=np.float32)
    assert np.abs(there_and_back(logprobs) - logprobs).max() <= 0.008


def test_minus_infinity_and_what_is_below_the_smallest_come_back_as_no_mass():
    found = there_and_back(np.array([-np.inf, -1e30, -65504.0, -65519.0, -66000.0], np.float32))
    assert (found == SMALLEST).all()
    assert (np.exp(found) == 0).all()


def test_certainty_comes_back_as_certainty():
    assert there_and_back(np.array([0.0], np.float32))[0] == 0


def test_control_a_codec_of_bfloat16_is_caught():
    logprobs = -np.linspace(1, 16, 1001, dtype=np.float32)
    wrong = (logprobs.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert not (np.abs(wrong - logprobs) <= LOGPROB_ERROR * np.abs(logprobs)).all()
    assert (np.abs(there_and_back(logprobs) - logprobs) <= LOGPROB_ERROR * np.abs(logprobs)).all()


@pytest.mark.parametrize("shape", [(0,), (3, 4)])
def test_any_shape_is_kept(shape):
    assert there_and_back(np.zeros(shape, np.float32)).shape == shape
