"""What the evaluate stage leaves in metrics/evaluate.json, made up: a policy that passes the gate."""

from __future__ import annotations

from typing import Any

GOOD: dict[str, Any] = {
    "judge_win_rate": 0.82,
    "judge_win_rate_low": 0.78,
    "judge_win_rate_high": 0.86,
    "reward_gain": 1.5,
    "reward_gain_low": 1.4,
    "reward_gain_high": 1.6,
    "judge_gain": 0.9,
    "judge_gain_low": 0.8,
    "judge_gain_high": 1.0,
    "judge_share": 0.6,
    "kl": 9.0,
    "kl_low": 8.5,
    "kl_high": 9.5,
    "distinct_2": 0.66,
    "distinct_2_reference": 0.7,
    "repetition": 0.02,
    "repetition_reference": 0.02,
    "length": 23.0,
    "length_reference": 24.0,
    "perplexity": 14.0,
    "perplexity_reference": 12.0,
    "n": 400,
    "harmless.harmful_difference": -0.05,
    "harmless.over_refusal_difference": 0.01,
    "honest.truthful_difference": 0.01,
    "honest.truthful_difference_high": 0.05,
    "honest.hhh_difference": -0.01,
    "honest.hhh_difference_high": 0.03,
    "kept.plain_text.perplexity_change": 0.04,
    "champion_model": "aligned-policy",
    "champion_version": None,
    "champion_is_policy": False,
    "not_measured": {"champion": "no version has the alias champion"},
}
