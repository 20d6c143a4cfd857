"""Bad input of every kind: the cases of bad_input.py, which python tests/bad_input.py runs all of."""

import bad_input
import pytest

CASES = 45  # of each group at least, spread evenly over it: 600 and more in all


@pytest.fixture(scope="module")
def harness():
    with bad_input.world() as harness:
        yield harness


@pytest.mark.parametrize("group", bad_input.GROUPS)
def test_bad_input_ends_in_one_clean_line_and_changes_nothing(group, harness):
    cases = list(bad_input.GROUPS[group]())
    wrong = []
    for case in cases[:: max(1, len(cases) // CASES)]:
        (ended, problem), *_ = harness.try_case(case)
        wrong += [f"{case.name}: {ended}, {problem}"] * bool(problem)
    assert not wrong, "\n".join(wrong)
