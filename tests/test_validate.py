"""The validate stage: what it writes, when it stops, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from feedback import PER_SPLIT, Data, small_params
from tiny import tiny_params

from tasks.__main__ import main
from tasks.data.facts import PAIR_SPLITS, PROMPT_SPLITS
from tasks.errors import DataError
from tasks.validate import run
from tasks.workspace import Workspace


@pytest.fixture
def data() -> Data:
    return Data()


def test_clean_data_passes_and_is_described(data: Data, tmp_path: Path) -> None:
    workspace = data.write(tmp_path)
    result = run(small_params(), workspace)
    assert result.metrics["expectations"]["passed"] == result.metrics["expectations"]["checked"] > 40
    assert result.metrics["failed"] == {}
    assert result.metrics["rows"] == dict.fromkeys([*PAIR_SPLITS, *PROMPT_SPLITS], PER_SPLIT)
    assert result.metrics["longer_wins"] == 0.5
    # Margins 0.5, 1.5, 2.5, 3.5 have targets 0.70, 0.75, 0.80, 0.85.
    assert result.metrics["mean_target_by_margin"] == {"from 0": 0.7, "from 1": 0.75, "from 2": 0.8, "from 3": 0.85}
    assert {path.name for path in workspace.report("validate").iterdir()} == {
        "report.html", "report.md", "pairs.svg", "lengths.svg",
    }  # fmt: skip
    assert "The data is fit for training" in (workspace.report("validate") / "report.md").read_text()


def test_a_breach_stops_with_the_rows_and_the_mend_and_leaves_the_rest_alone(data: Data, tmp_path: Path) -> None:
    data.set(3, chosen=" ", margin=99.0)
    data.set(PER_SPLIT, margin=12.0)
    workspace = data.write(tmp_path)
    model = workspace.policy / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    before = {path: path.read_bytes() for path in (workspace.pairs, workspace.prompts, model)}

    with pytest.raises(DataError) as caught:
        run(small_params(), workspace)

    assert caught.value.exit_code == 3
    blank, margin = caught.value.problems
    assert blank.where == "pairs.parquet:pair3:chosen"
    assert margin.where == "pairs.parquet:pair3:margin, pairs.parquet:pair10:margin"
    assert "2 of 40 rows" in margin.what
    assert "validate.max_margin" in margin.mend
    metrics = json.loads(workspace.metrics("validate").read_text())
    assert metrics["failed"] == {"pairs.not_blank.chosen": 1, "pairs.margin": 2}
    assert metrics["expectations"]["critical"] == 2
    report = workspace.report("validate")
    for name in ("report.html", "report.md"):
        assert "not fit for training: 2 critical expectations broken" in (report / name).read_text()
        assert "pair10" in (report / name).read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_a_wrong_schema_is_reported_without_asking_further(data: Data, tmp_path: Path) -> None:
    data.pairs = data.pairs.rename(columns={"chosen": "preferred"})
    workspace = data.write(tmp_path)
    with pytest.raises(DataError, match="missing: chosen; foreign: preferred"):
        run(small_params(), workspace)
    assert "not fit" in (workspace.report("validate") / "report.html").read_text()


def test_warnings_do_not_stop(data: Data, tmp_path: Path) -> None:
    data.pairs["chosen_tokens"] = 20
    workspace = data.write(tmp_path)
    result = run(small_params(), workspace)
    assert result.metrics["failed"] == {"pairs.longer_wins": 1}
    assert "warnings: pairs.longer_wins" in result.summary
    assert "The data is fit for training" in (workspace.report("validate") / "report.md").read_text()


def test_empty_tables_are_a_breach_like_any_other(data: Data, tmp_path: Path) -> None:
    empty = Data(data.pairs.iloc[:0], data.prompts.iloc[:0])
    with pytest.raises(DataError) as caught:
        run(small_params(), empty.write(tmp_path))
    assert [problem.what.split(":")[0] for problem in caught.value.problems] == [
        "pairs.splits_filled", "prompts.splits_filled",
    ]  # fmt: skip


def test_text_from_data_is_shown_not_obeyed(data: Data, tmp_path: Path) -> None:
    data.set(3, margin=9.0, chosen="<script>alert(1)</script> ![x](http://example.org/x.png) | cell")
    workspace = data.write(tmp_path)
    with pytest.raises(DataError):
        run(small_params(), workspace)
    page = (workspace.report("validate") / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    markdown = (workspace.report("validate") / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<", "")
    assert "![x](" not in markdown


def test_missing_or_unreadable_files_from_the_command_line(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path)
    workspace.params.write_text(yaml.safe_dump(tiny_params()))
    command = ["validate", "--workspace", str(tmp_path)]
    assert main(command) == 3
    assert "data/canonical/pairs.parquet — no such file" in capsys.readouterr().err
    data.write(tmp_path)
    workspace.prompts.write_text("no parquet")
    assert main(command) == 3
    assert "data/canonical/prompts.parquet — is not Parquet" in capsys.readouterr().err
    data.prompts.to_parquet(workspace.prompts)
    assert main([*command, "--set", "validate.min_pairs=5"]) == 0
    assert json.loads(workspace.metrics("validate").read_text())["expectations"]["critical"] == 0
