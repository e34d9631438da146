"""Profiles: what they change, where they run, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from scratch import git, guarded
from tiny import REPOSITORY

from flows import align as command
from flows.pipeline import place as place_of
from tasks.__main__ import main
from tasks.errors import ConfigError
from tasks.params import check_params, dump_params, load_params
from tasks.profiles import profile_file, profile_under
from tasks.versioning import up_to_date
from tasks.workspace import Workspace

pytest_plugins = ["scratch"]

PROFILES = sorted((REPOSITORY / "profiles").glob("*.yaml"))


def write(place: Workspace, name: str, text: str) -> Path:
    place.profiles.mkdir(exist_ok=True)
    file = place.profiles / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_sections_are_merged_lists_replaced_and_set_comes_last(place: Workspace) -> None:
    before = load_params(place.params)
    data = "[{source: 'file:chats.jsonl', format: hh}]"
    file = write(place, "mine", f"ppo: {{cycles: 5, update: {{epochs: 7}}}}\ningest: {{data: {data}}}\n")
    found = load_params(place.params, ["ppo.cycles=6"], file)
    expected = dump_params(before)
    expected["ppo"]["cycles"] = 6
    expected["ppo"]["update"]["epochs"] = 7
    expected["ingest"]["data"] = dump_params(found)["ingest"]["data"]
    assert dump_params(found) == expected
    assert [source.source for source in found.ingest.data] == ["file:chats.jsonl"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("ppo: {cycels: 3}", r"mine\.yaml:ppo\.cycels"),
        ("ppo: {update: {epochs: 0}}", r"mine\.yaml:ppo\.update\.epochs"),
        ("ingest: {data: [{source: 'file:a', format: sung}]}", r"mine\.yaml:ingest\.data\.0\.format"),
        ("ppo: 3", r"mine\.yaml:ppo"),
        ("ppo: {cycles: 3", r"mine\.yaml — is not YAML"),
        ("- 3", r"mine\.yaml — holds no sections"),
    ],
)
def test_what_is_wrong_in_a_profile_is_said_with_its_name(place: Workspace, text: str, where: str) -> None:
    file = write(place, "mine", text)
    with pytest.raises(ConfigError, match=where):
        load_params(place.params, profile=file)


def test_what_is_wrong_beside_a_profile_is_said_of_params_yaml(place: Workspace) -> None:
    file = write(place, "mine", "ppo: {cycles: 3}")
    raw = yaml.safe_load(place.params.read_text())
    place.params.write_text(yaml.safe_dump(raw | {"ppo": raw["ppo"] | {"rollouts": 3}}))
    with pytest.raises(ConfigError, match=r"params\.yaml:ppo\.rollouts"):
        load_params(place.params, profile=file)


@pytest.mark.parametrize("name", ["theirs", "../params", "", "mine.yaml"])
def test_an_unknown_profile_lists_those_there_are(place: Workspace, name: str) -> None:
    write(place, "mine", "seed: 1")
    write(place, "yours", "seed: 1")
    with pytest.raises(ConfigError, match="choose one of mine, yours"):
        profile_file(name, place)


def test_what_is_changed_in_the_form_comes_over_the_profile(place: Workspace) -> None:
    write(place, "mine", "seed: 9\nppo: {cycles: 5}")
    raw = dump_params(load_params(place.params))
    raw["ppo"] |= {"rollout_size": 4}
    found = profile_under(check_params(raw), "mine", place)
    assert (found.seed, found.ppo.cycles, found.ppo.rollout_size) == (9, 5, 4)


def test_a_reward_part_that_is_taken_away_in_the_form_goes(place: Workspace) -> None:
    raw = dump_params(load_params(place.params))
    raw["ppo"]["reward"]["parts"] = {"human": {}, "short": {"rule": "length", "target": 8}}
    place.params.write_text(yaml.safe_dump(raw))
    write(place, "mine", "ppo: {reward: {parts: {kind: {}}}}")
    del raw["ppo"]["reward"]["parts"]["short"]
    assert set(profile_under(check_params(raw), "mine", place).ppo.reward.parts) == {"human", "kind"}


def test_a_profile_runs_under_its_name_and_finds_its_results_again(place: Workspace) -> None:
    file = write(place, "mine", "ppo: {cycles: 5}")
    git(place.root, "add", "--all")
    where = place_of(load_params(place.params, profile=file), place, "mine")
    assert where.root == place.root / "work/worktrees/mine"
    assert load_params(where.params).ppo.cycles == 5
    guarded("ppo", where)
    assert up_to_date("ppo", where)
    again = place_of(load_params(place.params, profile=file), place, "mine")
    assert again == where
    assert up_to_date("ppo", again), "the lock of its own last run, not the checkout's"
    changed = place_of(load_params(place.params, ["ppo.cycles=6"], file), place, "mine")
    assert changed == where
    assert load_params(changed.params).ppo.cycles == 6
    assert not up_to_date("ppo", changed)
    assert up_to_date("ingest", changed)


def test_the_commands_know_profiles(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ingest", "--profile", "nowhere", "--workspace", str(tmp_path)]) == 2
    assert "there is no profile 'nowhere'" in capsys.readouterr().err
    assert command.main(["--profile", "nowhere"]) == 2
    assert "choose one of " in capsys.readouterr().err


def test_the_profile_for_harmlessness_and_helpfulness_measures_every_axis() -> None:
    params = load_params(REPOSITORY / "params.yaml", profile=REPOSITORY / "profiles/hh-rlhf.yaml")
    assert [name for name, sources in params.ingest.probes.named().items() if not sources] == []


@pytest.mark.parametrize("file", PROFILES, ids=lambda path: path.stem)
def test_a_profile_of_the_repository_is_valid_documented_and_registers_under_its_own_name(file: Path) -> None:
    params = load_params(REPOSITORY / "params.yaml", profile=file)
    assert params.register_.model_name != load_params(REPOSITORY / "params.yaml").register_.model_name
    head = file.read_text(encoding="utf-8").split("\n\n")[0].lower()
    assert all(f"# {word}" in head for word in ("what:", "data:", "licence:", "time:", "hardware:"))
    assert f"make align PROFILE={file.stem}" in (REPOSITORY / "docs/profiles.md").read_text(encoding="utf-8")
