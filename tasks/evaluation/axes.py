"""All axes of the evaluation: every probe is run, what it returns is judged, what it could not measure is kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks.evaluation.comparisons import Result, as_metrics, judged
from tasks.probes import PROBES
from tasks.probes.base import Asked, Figure, Missing, NotMeasured, Probe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Axes:
    """What was measured, in the order of the report, and what was not."""

    results: Sequence[Result] = ()
    not_measured: Sequence[NotMeasured] = ()

    @property
    def metrics(self) -> dict[str, Any]:
        """For metrics/evaluate.json: the figures flat, and under `not_measured` the reasons by key."""
        return as_metrics(self.results) | {"not_measured": {gap.key: gap.reason for gap in self.not_measured}}

    def without(self, gap: NotMeasured) -> Axes:
        """The same with one more gap."""
        return replace(self, not_measured=[*self.not_measured, gap])


def measure(asked: Asked, resamples: int, seed: int, probes: Mapping[str, Probe] = PROBES) -> Axes:
    """Run the `probes` and judge their figures. A probe without its data leaves a gap, and no error."""
    found: list[Figure | NotMeasured] = []
    for axis, probe in probes.items():
        log.info("measuring: %s", axis)
        try:
            found += probe(asked)
        except Missing as missing:
            found.append(NotMeasured(axis, axis, str(missing)))
    return Axes(
        [judged(figure, resamples, seed) for figure in found if isinstance(figure, Figure)],
        [gap for gap in found if isinstance(gap, NotMeasured)],
    )
