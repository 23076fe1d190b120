"""A sample of the malformed inputs in `make test`, all of them in `make test-full`: see `malformed`."""

import pytest

from malformed import COUNT, outcomes

SAMPLE = 60


def test_a_sample_ends_in_success_or_one_line_of_error() -> None:
    wrong = [(number, said) for number, said, _ in outcomes(SAMPLE, 7, COUNT // SAMPLE + 1) if said]
    assert wrong == []


@pytest.mark.slow
def test_all_end_in_success_or_one_line_of_error() -> None:
    wrong = [(number, said) for number, said, _ in outcomes(COUNT) if said]
    assert wrong == []
