"""The commands by which people decide on versions, and list them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from registered import NAME, aliases, mlflow
from tiny import tiny_params

from flows.server import free_port
from tasks.__main__ import COMMANDS, main
from tasks.errors import ConfigError
from tasks.params import check_params, load_params
from tasks.registration import trail
from tasks.registration.decisions import Statement
from tasks.workspace import Workspace

pytest_plugins = ["registered"]


def why(reason: str = "read 50 samples", **more: str) -> Statement:
    return Statement.of(reason, by="ada@desk", **more)


def told(place: Workspace) -> list[tuple[str, int, int | None, int | None]]:
    """Kind, version, champion and replaced of every decision."""
    return [(d.kind, d.version, d.champion, d.replaced) for d in trail.read(mlflow(place), NAME)]


def set_by_hand(place: Workspace, alias: str, version: int) -> None:
    mlflow(place).set_registered_model_alias(NAME, alias, str(version))


def test_the_commands_and_their_list(
    shelf: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ["--workspace", str(shelf.root)]
    assert main(["promote", "1", "--reason", "good", "--by", "Ada", *here]) == 0
    assert main(["promote", "9", "--reason", "good", *here]) == 2
    assert main(["reject", "1", "--reason", "bad", *here]) == 2
    assert main(["reject", "3", "--reason", "bad", "--expect-champion", "2", *here]) == 4
    said = capsys.readouterr()
    assert "Ada: version 1 promoted to champion after no champion. good" in said.out
    assert "there is no such version (there are: 1, 2, 3, 4)" in said.err
    set_by_hand(shelf, "champion", 2)
    assert main(["versions", *here]) == 0
    listing = capsys.readouterr().out
    rows = {line.split()[0]: line for line in listing.splitlines() if line[:1].isdigit()}
    assert list(rows) == ["4", "3", "2", "1"]
    assert "failed" in rows["4"]
    assert "champion" in rows["2"]
    assert "candidate" in rows["3"]
    assert "Ada: version 1 promoted" in listing
    assert f"version 3 waits for a decision: python -m tasks promote 3 --model {NAME} --reason" in listing
    assert "champion is version 2, set by hand outside of this tool, after version 1" in listing
    assert len(told(shelf)) == 1, "to look records nothing"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert main(["versions", *here]) == 9
    assert main(["rollback", "2", "--reason", "x", *here]) == 9


def test_a_decision_lands_on_the_model_that_it_names(shelf: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """A profile's, say, while params.yaml of the checkout names another."""
    raw = yaml.safe_load(shelf.params.read_text())
    shelf.params.write_text(yaml.safe_dump(raw | {"register": {"model_name": "harmless-policy"}}))
    here = ["--workspace", str(shelf.root)]
    assert main(["promote", "3", "--reason", "good", *here]) == 2
    assert "harmless-policy version 3 — there is no such version" in " ".join(capsys.readouterr().err.split())
    for command in (["promote", "2"], ["promote", "3"], ["rollback", "3"], ["reject", "1"]):
        assert main([*command, "--reason", "good", "--model", NAME, *here]) == 0
    assert aliases(shelf) == {"champion": 2}
    assert main(["versions", "--model", NAME, *here]) == 0
    assert "version 2 put back as champion after version 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a'", "x; ls"])
def test_a_model_name_that_no_command_line_can_hold_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"register\.model_name"):
        check_params(tiny_params() | {"register": {"model_name": name}})


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    help_text = capsys.readouterr().out
    assert f"usage: python -m tasks {name}" in help_text
    assert "--workspace" in help_text
    assert "exit codes: 0 ok" in help_text


def test_before_anything_is_registered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Workspace(tmp_path)
    place.params.write_text(yaml.safe_dump(tiny_params()), encoding="utf-8")
    assert main(["versions", "--workspace", str(tmp_path)]) == 0
    assert "nothing is registered yet" in capsys.readouterr().out
    assert main(["promote", "1", "--reason", "x", "--workspace", str(tmp_path)]) == 2
    assert "nothing is registered yet" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists(), "asking makes no store"
    assert load_params(place.params).register_.model_name == NAME
