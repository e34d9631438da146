"""The axes of the evaluation, one module a probe. To add one: a file with `measure`, and a line in PROBES."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.probes.base import Probe

PROBES: Mapping[str, Probe] = {}
