"""1,000 draws of wrong and right arguments; `python tests/fuzz.py --draws 20000` for more."""

import pytest
from fuzz import fuzz


@pytest.mark.slow
def test_nothing_that_is_handed_in_surprises(tmp_path):
    fuzz(1_000, tmp_path)
