"""The evaluation report: it says what was found, shows what was said, and runs nothing of it."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from answers import Asked, better_answers, cycles, reference_answers, trained_workspace

from tasks.evaluate import measure, samples
from tasks.evaluation import axes
from tasks.evaluation.axes import Axes
from tasks.evaluation.gate import Breach, Unchecked, Verdict
from tasks.reports import answer_tables, axes_plots, plots
from tasks.reports.evaluation import Evaluation, verdict, write_report
from tasks.statistics import by_margin, expected_calibration_error

PASSED = Verdict([], [])
NASTY = "<script>alert(1)</script> | **bold** [x](http://example.com) `code`\r\n# not a heading\rnor this"


def answers():
    reference = reference_answers()
    return better_answers(reference), reference


def write(root, policy, reference, gate=PASSED):
    """Write the report of these answers below `root`; gives its folder."""
    workspace, params = trained_workspace(root)
    answers = {"policy": policy, "reference": reference}
    found = axes.measure(Asked(answers, workspace, params), 50, seed=1)
    metrics = measure(policy, reference, 50, seed=1) | found.metrics | {"mlflow_run_id": "run-1"}
    ppo = {"fingerprint": "f", "cycles": 4, "stopped_by": "kl_budget", "result_cycle": 3, "maximised": "its aim"}
    folder = workspace.report("evaluate")
    folder.mkdir(parents=True)
    evaluation = Evaluation(metrics, ppo, cycles(), samples(answers), policy, reference, found, gate)
    write_report(folder, evaluation, params, workspace)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a better policy; read only."""
    return write(tmp_path_factory.mktemp("report"), *answers())


def figures(**changes):
    return {
        "n": 400, "judge_win_rate": 0.8, "judge_win_rate_low": 0.76, "judge_win_rate_high": 0.84, "reward_gain": 1.5,
        "reward_gain_low": 1.4, "judge_gain": 0.9, "judge_gain_low": 0.8, "judge_share": 0.6, "kl": 9.0, **changes,
    }  # fmt: skip


def test_verdict_of_an_improvement():
    ok, text = verdict(figures(), Axes(), PASSED)
    assert ok
    assert text == (
        "Of 400 test prompts the judge prefers the aligned model in 80.0 % [76.0 %, 84.0 %]. "
        "The reward model sees a gain of +1.50 sd, the judge of +0.90 sd: it confirms 60.0 %. "
        "KL to the reference: 9.0 nats. The gate passed."
    )


def test_an_improvement_that_the_gate_does_not_pass_has_no_tick(tmp_path):
    unchecked = Unchecked("max_honest_fall", "fall of an honest figure beyond chance was not measured: no statements")
    failed = Verdict([Breach("max_kl", 20.0, 15.0, "KL is 20, over the most allowed, 15")], [unchecked])
    ok, text = verdict(figures(), Axes(), failed)
    assert not ok
    assert text.endswith("The gate failed: max_kl.")
    folder = write(tmp_path, *answers(), gate=failed)
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for page in (html, markdown.replace("\\", "")):
        assert "✗" in page
        assert "✓" not in page
        for said in (
            "breached",
            "max_kl",
            "KL is 20, over the most",
            "not checked",
            "max_honest_fall",
            "no statements",
        ):
            assert said in page


def test_verdict_of_chance_of_a_loss_and_of_a_gamed_reward():
    chance = verdict(figures(judge_win_rate_low=0.47), Axes(), PASSED)
    assert not chance[0]
    assert "[47.0 %, 84.0 %], which may be chance." in chance[1]
    lost = verdict(figures(judge_win_rate_low=0.3, judge_win_rate_high=0.4), Axes(), PASSED)
    assert not lost[0]
    assert "prefers the reference" in lost[1]
    gamed = verdict(figures(judge_gain_low=-0.1), Axes(), PASSED)
    assert not gamed[0]
    assert "being gamed" in gamed[1]


def test_verdict_names_no_share_of_a_gain_that_may_not_exist():
    _, text = verdict(figures(reward_gain=0.03, reward_gain_low=-0.1, judge_share=-9.8), Axes(), PASSED)
    assert "confirms" not in text
    assert "gamed" not in text


class Page(HTMLParser):
    """Collects tags, and what would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.outside += [v for k, v in attrs if k in {"src", "href"} and not v.startswith("data:")]


def test_texts_of_models_are_shown_and_never_run(tmp_path):
    policy, reference = answers()
    hostile = [f"{NASTY} {i}" for i in range(len(policy.texts))]
    hostile_policy = replace(policy, texts=hostile, prompts=hostile)
    folder = write(tmp_path, hostile_policy, replace(reference, prompts=hostile))
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    parsed = Page()
    parsed.feed(html)
    assert parsed.outside == []
    assert not {"script", "a", "code"} & parsed.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>" not in markdown
    assert "[x](http" not in markdown
    assert not re.search(r"^(# not|nor this)", markdown, flags=re.MULTILINE)
    rows = [line for line in markdown.splitlines() if "alert(1)" in line]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)


def test_page_and_markdown_say_the_same(written):
    html, markdown = (written / "report.html").read_text(), (written / "report.md").read_text()
    titles = re.findall(r"^## (.+)$", markdown, flags=re.MULTILINE)
    assert titles == re.findall(r"<h2>(.+?)</h2>", html)
    for said in (
        "judge win rate",
        "distinct-2",
        "MIT",
        "ppo.reward.kl_coef",
        "KL budget spent",
        "Cycle 3 is the result",
    ):
        assert said in html
        assert said.replace("_", r"\_") in markdown or said in markdown


def test_pictures_lie_beside_the_markdown(written):
    names = set(re.findall(r"\]\(([^)]+\.svg)\)", (written / "report.md").read_text()))
    assert names == {path.name for path in written.glob("*.svg")}
    assert (written / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_answers_give_the_same_report(written, tmp_path):
    second = write(tmp_path, *answers())
    assert {p.name: p.read_bytes() for p in written.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_samples_show_the_extremes_and_some_drawn_blindly(tmp_path):
    policy, reference = answers()
    judge = reference.judge.copy()
    judge[7], judge[9] = judge[7] + 50, judge[9] - 50
    texts = [f"answer {i}." for i in range(len(judge))]
    folder = write(tmp_path, replace(policy, judge=judge, texts=texts), reference)
    parts = dict(re.findall(r"## (.+?)\n(.*?)(?=\n## |\Z)", (folder / "report.md").read_text(), flags=re.DOTALL))
    assert "answer 7." in parts["Largest gains by the judge"]
    assert "answer 9." in parts["Largest losses by the judge"]
    assert parts["Answers drawn at random"].count("| answer ") == 1  # of four samples, one each


def test_conversations_are_shown_turn_by_turn():
    assert answer_tables._turns('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]') == (
        "user: Hi\nassistant: Yes"
    )
    for plain in ("the film", "[1, 2]", "12", '{"role": "user"}', "[broken"):
        assert answer_tables._turns(plain) == plain


def test_an_empty_answer_is_said_to_be_empty_and_a_long_one_is_cut():
    assert answer_tables._shown(" \n") == "(empty)"
    assert len(answer_tables._shown("x" * 5000)) == answer_tables.EXCERPT


@pytest.mark.parametrize("missing", ["kl", "judge_gain", "judge_win_rate", "repetition", "distinct_2_reference"])
def test_a_column_that_was_not_recorded_leaves_out_its_curve(missing):
    table = cycles().drop(columns=missing)
    plots.cycles_figure(table, 15.0, 2)
    axes_plots.overoptimisation_figure(table, 15.0)
    (language,) = plots.language_figure(table).axes
    left_out = {"repetition": "repeated words", "distinct_2_reference": "distinct-2"}.get(missing)
    assert left_out not in [line.get_label() for line in language.lines]


def test_one_cycle_is_enough():
    gains, *_ = plots.cycles_figure(cycles(1), 15.0, 1).axes
    assert len(gains.lines[0].get_xdata()) == 2


def test_curves_show_the_numbers_of_the_table():
    table = cycles(4)
    gains, rates, divergence = plots.cycles_figure(table, kl_budget=15.0).axes
    reward, judge = gains.lines
    np.testing.assert_allclose(reward.get_ydata(), [0, *table["reward_gain"]])
    np.testing.assert_allclose(judge.get_ydata(), [0, *table["judge_gain"]])
    np.testing.assert_allclose(rates.lines[0].get_ydata(), [0.5, *table["judge_win_rate"]])
    np.testing.assert_allclose(divergence.lines[0].get_ydata(), [0, *table["kl"]])
    assert set(divergence.lines[1].get_ydata()) == {15.0}


def test_gain_is_drawn_against_the_kl_in_order_of_kl():
    table = pd.DataFrame({"cycle": [1, 2], "kl": [4.0, 3.0], "reward_gain": [1.0, 0.8], "judge_gain": [0.5, 0.6]})
    (axes,) = axes_plots.overoptimisation_figure(table, 15.0).axes
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0, 3, 4])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0, 0.8, 1])


def test_reward_model_figure_takes_what_the_stage_measures():
    draw = np.random.default_rng(0)
    metrics = {}
    for role, widest in (("reward", 4.0), ("judge", 1.5)):
        margin, probability = draw.uniform(0, widest, 200), draw.random(200)
        error, bins = expected_calibration_error(probability, draw.random(200))
        right = (probability > 0.5).astype(float)
        metrics[role] = {"by_margin": by_margin(right, margin, (0, 1, 2, 8)), "calibration": bins, "ece": error}
    left, _ = plots.reward_model_figure(metrics).axes
    # The judge saw no pairs of the widest gap; its dots still stand over their own gaps.
    assert [label.get_text() for label in left.get_xticklabels()] == ["0–1", "1–2", "2–8"]
    assert len(left.containers[0].lines[0].get_xdata()) == 3
    assert left.containers[1].lines[0].get_xdata() == pytest.approx([0.08, 1.08])
