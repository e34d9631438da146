"""A version beside the champion, figure by figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # MLflow takes seconds to import
    from tasks.registration.registry import ModelVersion

FIGURES = {
    "judge_win_rate": "Judge win rate",
    "reward_gain": "Reward-model gain, sd of human text",
    "judge_gain": "Judge gain, sd of human text",
    "judge_share": "Judge gain / reward-model gain",
    "kl": "KL to the model before, nats a response",
}
"""Go into a version's tags, so that versions can be compared in the registry's list; and what they are."""
GATE, BREACHED = "gate", "breached"
"""Tags of a version, and keys of metrics/register.json: the verdict, and the rules that do not hold."""
OTHER = "other_champion"
"""Key of metrics/register.json: whether the evaluation compared with another champion than there is now."""
EVALUATE_AGAIN = "the champion is another since; run evaluate again"
VERSION, DIFFERENCE = "champion.version", "champion.difference."
"""Tags of a version: the champion that it was compared with, and by how much its figure is higher than that one's."""


@dataclass(frozen=True)
class ChampionFigures:
    """The version in service when another one was evaluated."""

    version: str
    figures: Mapping[str, float]
    measured: bool
    """All on the same prompts, by the same evaluation; else some figures are those of its own evaluation."""


def champion_of(evaluation: Mapping[str, Any], champion: ModelVersion | None) -> ChampionFigures | None:
    """The champion's figures: what this evaluation measured of it, and for the rest its tags."""
    if champion is None:
        return None
    number, figures, measured = str(champion.version), _tagged(champion), {}
    compared = evaluation.get("champion_model"), str(evaluation.get("champion_version"))
    if compared == (champion.name, number):
        found = {key.removesuffix("_champion"): value for key, value in evaluation.items() if key.endswith("_champion")}
        measured = {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
    return ChampionFigures(number, figures | measured, measured.keys() >= FIGURES.keys())


def difference(evaluation: Mapping[str, Any], champion: ChampionFigures, key: str) -> float | None:
    """How much higher the figure is than the champion's; None where one of them is missing."""
    mine, other = evaluation.get(key), champion.figures.get(key)
    return mine - other if isinstance(mine, int | float) and other is not None else None


def tags(evaluation: Mapping[str, Any], champion: ChampionFigures | None) -> dict[str, str]:
    """For the version: what it was compared with and how it differs. Figures that are missing have no tag."""
    if champion is None:
        return {VERSION: "none"}
    differences = {key: difference(evaluation, champion, key) for key in FIGURES}
    return {VERSION: champion.version} | {
        DIFFERENCE + key: f"{value:+.4g}" for key, value in differences.items() if value is not None
    }


def _tagged(champion: ModelVersion) -> dict[str, float]:
    """Its figures as its registration left them; people may write tags, too."""
    found = {}
    for key in FIGURES:
        try:
            found[key] = float(champion.tags[key])
        except (KeyError, ValueError):
            continue
    return found
