"""What a person reads of the reward model and the judge."""

from __future__ import annotations

from typing import Any

from tasks import pages
from tasks.models.preference_models import label
from tasks.reports.plots import reward_model_figure
from tasks.workspace import Workspace

_ROWS = (
    ("held-out accuracy, wide rating gaps", "accuracy"),
    ("held-out accuracy, all pairs", "accuracy_all"),
    ("share of rater pairs that agree with the majority (ceiling against single votes)", "rater_ceiling"),
    ("accuracy of choosing the longer text (baseline)", "longer_wins"),
    ("held-out accuracy where the longer text wins", "accuracy_where_longer_wins"),
    ("held-out accuracy where the shorter text wins", "accuracy_where_shorter_wins"),
    ("expected calibration error", "ece"),
)
_LEAD = (
    "Two models of the same human preferences. PPO maximises the reward model; the judge, another pretrained model "
    "trained on other texts, only ever measures."
)


def write_report(metrics: dict[str, Any], workspace: Workspace) -> None:
    """`report.html` and `report.md` in reports/reward_model."""
    folder = workspace.report("reward_model")
    folder.mkdir(parents=True, exist_ok=True)
    headers = ["figure", *map(label, metrics)]
    rows = [[said, *(_cell(figures, key) for figures in metrics.values())] for said, key in _ROWS]
    figure = pages.figure(reward_model_figure(metrics), "accuracy by rating gap, and calibration")
    (folder / "report.html").write_text(
        pages.page("Reward model and judge", _LEAD, [pages.table(headers, rows), figure]), encoding="utf-8"
    )
    table = pages.markdown_table(headers, rows)
    (folder / "report.md").write_text(f"# Reward model and judge\n\n{_LEAD}\n\n{table}\n", encoding="utf-8")


def _cell(figures: dict[str, Any], key: str) -> str:
    if key not in figures:
        return "no such pairs"
    text = f"{figures[key]:.3f}"
    if f"{key}_low" in figures:
        n = figures["n" if key == "accuracy" else "n_all"]
        text += f" [{figures[f'{key}_low']:.3f}, {figures[f'{key}_high']:.3f}], n = {n}"
    return text
