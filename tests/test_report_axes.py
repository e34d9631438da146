"""The axes in the report: what was measured against whom, and what was not, on the page and in Markdown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from answers import Asked, better_answers, cycles, reference_answers, trained_workspace
from markupsafe import Markup

from tasks.evaluate import measure, samples
from tasks.evaluation import axes
from tasks.evaluation.comparisons import Comparison
from tasks.evaluation.gate import Verdict
from tasks.probes import PROBES
from tasks.probes.base import NotMeasured
from tasks.reports import axes_plots, axes_tables
from tasks.reports.evaluation import Evaluation, verdict, write_report
from tasks.statistics import Interval

OURS = {axis: PROBES[axis] for axis in ("helpful", "kept", "hacked")}
PASSED = Verdict([], [])
CHAMPION = {"champion_version": 3, "champion_model": "aligned-policy", "champion_is_policy": False}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    """A report with a champion, a gap and a block of the inspector; read only."""
    workspace, params = trained_workspace(tmp_path_factory.mktemp("report"))
    reference = reference_answers()
    answers = {"policy": better_answers(reference), "reference": reference}
    answers["champion"] = better_answers(reference, 0.8, 0.4, seed=5)
    found = axes.measure(Asked(answers, workspace, params), 50, 1, OURS)
    found = found.without(NotMeasured("harmless.harmful", "harmful replies", "nobody *labelled* any"))
    metrics = measure(answers["policy"], reference, 50, 1) | found.metrics | CHAMPION | {"mlflow_run_id": "run-1"}
    ppo = {"fingerprint": "f", "cycles": 4, "stopped_by": "cycles", "result_cycle": 3, "maximised": "its aim"}
    blocks = [Markup("<p>drawn token by token</p>")]
    table = samples(answers)
    whole = Evaluation(metrics, ppo, cycles(), table, answers["policy"], reference, found, Verdict([], []), blocks)
    folder = workspace.report("evaluate")
    folder.mkdir(parents=True)
    write_report(folder, whole, params, workspace)
    return folder, whole


def test_what_was_not_measured_is_said_on_page_and_in_markdown(evaluation: tuple[Path, Evaluation]) -> None:
    folder, _ = evaluation
    assert "not measured: nobody *labelled* any" in (folder / "report.html").read_text()
    assert r"not measured: nobody \*labelled\* any" in (folder / "report.md").read_text()


def test_the_champion_has_a_table_and_stands_in_the_verdict(evaluation: tuple[Path, Evaluation]) -> None:
    folder, whole = evaluation
    text = (folder / "report.md").read_text()
    assert "## Against the champion" in text
    assert "The champion is version 3 of aligned-policy" in text
    rate = f"{100 * whole.metrics['helpful.judge_champion_wins']:.1f} %"
    _, said = verdict(whole.metrics, whole.axes, whole.gate)
    assert f"Against the champion, version 3, the judge prefers it in {rate}" in said


def test_the_inspector_s_blocks_are_on_the_page(evaluation: tuple[Path, Evaluation]) -> None:
    folder, _ = evaluation
    assert "<p>drawn token by token</p>" in (folder / "report.html").read_text()
    assert "## Token by token\n\nDrawn on the page: report.html." in (folder / "report.md").read_text()


def test_the_picture_turns_every_change_so_that_right_is_better(evaluation: tuple[Path, Evaluation]) -> None:
    _, whole = evaluation
    (drawn,) = axes_plots.axes_figure(whole.axes.results).axes
    places = iter([float(c.lines[0].get_xdata()[0]) for c in drawn.containers if len(c.lines[0].get_xdata())])
    for result in whole.axes.results:
        spread = np.std(result.figure.values["reference"]) or np.std(result.figure.values["policy"]) or 1.0
        for comparison in result.against.values():
            sign = -1 if result.figure.better == "lower" else 1
            assert next(places) == pytest.approx(sign * comparison.difference.value / spread)


@pytest.mark.parametrize(
    ("better", "value", "p", "word"),
    [
        ("higher", 0.1, 0.01, "better"), ("higher", -0.1, 0.01, "worse"), ("lower", -0.1, 0.01, "better"),
        ("lower", 0.1, 0.2, "no clear change"), ("same", 0.1, 0.01, "changed"),
    ],
)  # fmt: skip
def test_a_change_is_read_in_a_word(better: str, value: float, p: float, word: str) -> None:
    assert axes_tables.reading(Comparison(Interval(value, value, value, 9), p, None), better) == word


def test_figures_are_shown_with_their_unit() -> None:
    assert axes_tables.value(0.123, "share") == "12.3 %"
    assert axes_tables.between(Interval(-0.02, -0.05, 0.01, 9), "share") == "-2.0 pp [-5.0, +1.0]"
    assert axes_tables.between(Interval(0.8, 0.7, 0.9, 9), "sd") == "+0.80 sd [+0.70, +0.90]"
