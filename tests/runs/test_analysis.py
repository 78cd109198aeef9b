"""What a user asks of a comparison, checked before anything starts."""

import math
from typing import Any

import pytest

from fedmaestro.errors import UserError
from fedmaestro.runs.analysis import Asked
from fedmaestro.runs.records import ACCURACY, Analysis, MetricFacts

RMSE = MetricFacts(name="rmse", higher_is_better=False, percent=False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"baseline": "nestd"}, "unknown --baseline 'nestd': did you mean 'nested'"),
        ({"margin": 0.0}, "--margin 0: give a positive number"),
        ({"margin": math.inf}, "--margin inf"),
        ({"margin": math.nan}, "--margin nan"),
        ({"last": 0}, "--last 0: at least one"),
        ({"last": 5}, "--last 5: more than the evaluated rounds of a run .4."),
        ({"target": math.nan}, "--target nan: give a finite"),
        ({"target": 0.95}, "--target 0.95: accuracy is in percent"),
        ({"target": 101.0}, "--target 101: accuracy is in percent"),
    ],
)
def test_what_makes_no_sense_is_one_line(asked: dict[str, Any], message: str) -> None:
    def check(wanted: Asked) -> None:
        wanted.check(["nested", "zero-pad"], 4)
        wanted.analysis(ACCURACY)

    with pytest.raises(UserError, match=message):
        check(Asked(**asked))


def test_percent_become_shares_and_other_metrics_stay() -> None:
    asked = Asked(baseline="a", margin=2.0, last=3, target=95.0)
    assert asked.analysis(ACCURACY) == Analysis(baseline="a", margin=0.02, last=3, target=0.95)
    assert asked.analysis(RMSE) == Analysis(baseline="a", margin=2.0, last=3, target=95.0)
    assert Asked().analysis(ACCURACY) == Analysis()
    assert Asked(target=0.5).analysis(RMSE).target == 0.5
