"""How the rows of a comparison are to be judged: what a user asks for, checked, in the metric's own unit."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from fedmaestro.errors import UserError, check_name
from fedmaestro.report.format import Shown
from fedmaestro.runs.records import Analysis, MetricFacts


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user asks for; shares are in percent, as tables show them.

    Attributes:
        baseline: label of the row that the others are compared with; None: the first.
        margin: differences below it count as none; None: half a point for shares.
        last: evaluated rounds at the end of a run whose mean is judged.
        target: of the mean over tiers; None: there is none.
    """

    baseline: str | None = None
    margin: float | None = None
    last: int = 1
    target: float | None = None

    def check(self, labels: Collection[str], evaluated: int) -> None:
        """Check what needs no data.

        Args:
            labels: of the rows.
            evaluated: rounds after the start that the row with the fewest evaluates.

        Raises:
            UserError: an unknown row, a margin that is not positive, more rounds than are evaluated.
        """
        if self.baseline is not None:
            check_name("--baseline", self.baseline, labels)
        if self.margin is not None and not 0 < self.margin < math.inf:
            raise UserError(f"--margin {self.margin:g}: give a positive number, in points where the metric is a share")
        if self.last < 1:
            raise UserError(f"--last {self.last}: at least one round is needed")
        if self.last > evaluated:
            raise UserError(
                f"--last {self.last}: more than the evaluated rounds of a run ({evaluated}): give fewer, or lower "
                "train.evaluate-every"
            )
        if self.target is not None and not math.isfinite(self.target):
            raise UserError(f"--target {self.target}: give a finite number")

    def analysis(self, metric: MetricFacts) -> Analysis:
        """Return what is written down.

        Raises:
            UserError: a target that the metric cannot have, or that was given as a fraction.
        """
        factor, target = Shown(metric).factor, self.target
        if target is not None and metric.percent and not 1 < target <= 100:
            raise UserError(f"--target {target:g}: {metric.name} is in percent: give a number from 1 to 100")
        return Analysis(
            baseline=self.baseline,
            margin=None if self.margin is None else self.margin / factor,
            last=self.last,
            target=None if target is None else target / factor,
        )
