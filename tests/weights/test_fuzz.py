import pytest

from tests.weights.fuzz import fuzz


@pytest.mark.slow
def test_damaged_files_are_read_or_refused():
    assert fuzz(20_000, seed=1) == []
