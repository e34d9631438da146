"""The axes of the evaluation, one module a probe. To add one: a file with `measure`, and a line in PROBES."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.probes import hacked, harmless, helpful, honest, kept
from tasks.probes.base import Probe

PROBES: Mapping[str, Probe] = {
    "helpful": helpful.measure,
    "harmless": harmless.measure,
    "honest": honest.measure,
    "kept": kept.measure,
    "hacked": hacked.measure,
}
"""By axis, in the order of the report."""
