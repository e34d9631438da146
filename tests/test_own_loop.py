"""The loop of docs/own_loop.md, as it stands there, on a tiny model: the reward rises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import REPOSITORY

from tasks.workspace import Workspace

PAGE = REPOSITORY / "docs" / "own_loop.md"
(LOOP,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_loop_raises_the_reward(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base = Workspace(tmp_path).base_model
    base.parent.mkdir(parents=True)
    base.symlink_to(policy_folder)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    left: dict[str, object] = {}
    exec(compile(LOOP, str(PAGE), "exec"), left)
    rewards = [float(reward) for reward in re.findall(r"reward (\S+)", capsys.readouterr().out)]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards


def test_the_loop_is_about_forty_lines_and_needs_no_other_package_of_ours():
    code = [line for line in LOOP.splitlines() if line and not line.lstrip().startswith(("#", "import", "from"))]
    assert len(code) <= 42
    assert not re.search(r"^(?:from|import) (?:tasks|flows|prefect|mlflow|dvc)", LOOP, flags=re.MULTILINE)
