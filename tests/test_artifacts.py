"""Which report becomes an artifact: the one that this run wrote, and none that an earlier one left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows import artifacts
from tasks.workspace import Workspace

NOW = 1_800_000_000.0


@pytest.mark.parametrize(("age", "published"), [(-5.0, True), (0.004, True), (60.0, False)])
def test_a_report_is_published_if_this_run_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, published: bool
) -> None:
    """4 ms is a tick of the clock that Linux stamps files with (CONFIG_HZ=250), which lags behind `time.time()`."""
    made: list[str] = []
    monkeypatch.setattr(artifacts, "check_answers", lambda *_, **__: None)
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda markdown, *_: made.append(markdown))
    workspace = Workspace(tmp_path)
    report = workspace.report("evaluate") / "report.md"
    report.parent.mkdir(parents=True)
    report.write_text("# Aligned", encoding="utf-8")
    os.utime(report, (NOW - age, NOW - age))
    artifacts.publish_report("evaluate", workspace, NOW)
    assert made == (["# Aligned"] if published else [])
