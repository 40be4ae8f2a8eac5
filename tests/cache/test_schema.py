import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import schema
from pipeline.cache.schema import Logits, groups
from pipeline.signals.codec import count_table, step_table
from tests.cache import made


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), max_size=40))
def test_a_row_group_ends_with_the_record_that_fills_it(sizes):
    positions, tokens = [a for a, _ in sizes], [b for _, b in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "GROUP_POSITIONS", 100)
        patch.setattr(schema, "GROUP_TOKENS", 250)
        found = groups(positions, tokens)
    assert sum(found) == len(sizes)
    assert all(found)
    first = 0
    for number, count in enumerate(found):
        here, there = sum(positions[first : first + count]), sum(tokens[first : first + count])
        full = here >= 100 or there >= 250
        assert full or number == len(found) - 1
        assert here - positions[first + count - 1] < 100
        assert there - tokens[first + count - 1] < 250
        first += count


@pytest.mark.parametrize("form", [made.form(), made.form(method="sampled"), made.form(logsumexp=True, boundary=True), made.form(temperatures=[1.0]), made.form(temperatures=[1.0, 1.5, 3.0])])
def test_a_file_explains_itself(form: Logits):
    again = Logits.from_metadata(form.metadata(), form.schema().names)
    assert {**vars(again), "table": None} == {**vars(form), "table": None}
    np.testing.assert_allclose(again.table, form.table, atol=1e-8)
    assert again.schema().equals(form.schema())


def test_the_table_of_what_is_drawn_is_that_of_counts_and_has_no_threshold():
    drawn = Logits.of("sampled", [1.0], (0.02, 0.5), 0.002, 4, 50, 100)
    assert (drawn.table == count_table(50)).all()
    assert (drawn.threshold, drawn.least, drawn.most) == (0.0, 0, 50)
    assert (Logits.of("head", [1.0], (0.02, 0.5), 0.002, 4, 50, 100).table == step_table(0.02, 0.5)).all()
