"""What `make faults` prints: each fault, what must happen, what was seen.

A test names its fault, `@pytest.mark.fault("9: a flipped byte in a checkpoint", expected="exit 4, both hashes")`, and
says what it saw through the fixture `seen`: `seen("exit 4, policy.safetensors")`. The numbers are those of
docs/reliability.md; a fault outside its list has none. A test that takes more than a few seconds is marked `fault_slow`
as well: `make test` leaves it out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

_KEY = pytest.StashKey[Counter[tuple[str, str, str]]]()


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say what was observed; the last word goes into the table."""
    return lambda text: request.node.user_properties.append(("seen", text))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    marker = item.get_closest_marker("fault")
    if marker is not None and (report.when == "call" or not report.passed):
        said = dict(item.user_properties).get("seen", "as expected")
        if not report.passed:
            said = f"{report.outcome.upper()}: {call.excinfo.exconly().splitlines()[0] if call.excinfo else ''}"
        item.config.stash[_KEY][(marker.args[0], marker.kwargs["expected"], said)] += 1
    return report


def pytest_terminal_summary(config: pytest.Config) -> None:
    """Only where faults are what was asked for: `pytest -m fault`."""
    if not str(config.option.markexpr).startswith("fault"):
        return
    table = Table("fault", "expected", "seen", title=f"{config.stash[_KEY].total()} tests of faults", show_lines=True)
    for (fault, expected, outcome), times in sorted(config.stash[_KEY].items(), key=_by_number):
        table.add_row(fault, expected, outcome if times == 1 else f"{outcome} ({times} times)")
    Console(width=140, markup=False).print(table)


def _by_number(entry: tuple[tuple[str, str, str], int]) -> tuple[int, str]:
    fault = entry[0][0]
    number = re.match(r"\d+", fault)
    return (int(number[0]) if number else 1000, fault)
