"""Decisions of people on a registry in SQLite: who is champion, what the trail says, what is refused, races."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from registered import GOOD, NAME, aliases, mlflow, params, register_another, write

from tasks import register
from tasks.errors import ConfigError, IntegrityError
from tasks.registration import model_card, trail
from tasks.registration.decisions import Statement, promote, reject, rollback
from tasks.workspace import Workspace

pytest_plugins = ["registered"]


def why(reason: str = "read 50 samples", **more: str) -> Statement:
    return Statement.of(reason, by="ada@desk", **more)


def told(place: Workspace) -> list[tuple[str, int, int | None, int | None]]:
    """Kind, version, champion and replaced of every decision."""
    return [(d.kind, d.version, d.champion, d.replaced) for d in trail.read(mlflow(place), NAME)]


def set_by_hand(place: Workspace, alias: str, version: int) -> None:
    mlflow(place).set_registered_model_alias(NAME, alias, str(version))


def test_a_promoted_version_is_champion_and_no_candidate_and_the_trail_says_all(shelf: Workspace) -> None:
    assert aliases(shelf) == {"candidate": 3}
    promote(shelf, NAME, 2, why("first"))
    assert aliases(shelf) == {"candidate": 3, "champion": 2}, "another candidate goes on waiting"
    promote(shelf, NAME, 3, why("better\non every axis"))
    assert aliases(shelf) == {"champion": 3}
    first, second = trail.read(mlflow(shelf), NAME)
    assert (first.kind, first.version, first.replaced, first.by) == ("promoted", 2, None, "ada@desk")
    assert (second.champion, second.replaced, second.reason) == (3, 2, "better on every axis")
    assert second.at.endswith("Z")
    assert first.at <= second.at
    for version in (2, 3):
        page = mlflow(shelf).get_model_version(NAME, str(version))
        assert page.tags["decision"] == str(second)
        assert "version 3 promoted to champion after version 2" in page.description
        assert "better on every axis" in page.description
        assert "Waits for a person" not in page.description
        assert "### Use" in page.description, "the rest of the page stays"


def test_the_files_are_read_again_and_those_of_another_version_do_not_count(shelf: Workspace) -> None:
    """models/policy has moved on: it is not there at all."""
    version = mlflow(shelf).get_model_version(NAME, "1")
    (stored,) = (Path(version.source.removeprefix("file://")) / "artifacts").rglob("model.safetensors")
    content = stored.read_bytes()
    try:
        stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=r"version 1 — its files are not what was registered"):
            promote(shelf, NAME, 1, why())
    finally:
        stored.write_bytes(content)
    mlflow(shelf).delete_model_version_tag(NAME, "2", "policy.sha256")
    with pytest.raises(IntegrityError, match=r"version 2 — has no tag policy\.sha256"):
        promote(shelf, NAME, 2, why())
    assert (aliases(shelf), told(shelf)) == ({"candidate": 3}, [])
    promote(shelf, NAME, 1, why())
    assert aliases(shelf)["champion"] == 1


def test_files_that_are_gone_are_told(shelf: Workspace) -> None:
    source = Path(mlflow(shelf).get_model_version(NAME, "1").source.removeprefix("file://"))
    source.rename(source.with_name("elsewhere"))
    try:
        with pytest.raises(IntegrityError, match=r"version 1 — holds no policy \(.*\) — register a policy"):
            promote(shelf, NAME, 1, why())
    finally:
        source.with_name("elsewhere").rename(source)


def test_a_version_that_failed_the_gate_needs_a_word_and_the_trail_says_so(shelf: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"version 4 — failed the gate \(max_kl\) — .*--despite-gate"):
        promote(shelf, NAME, 4, why())
    promote(shelf, NAME, 4, Statement.of("KL is harmless here", despite_gate=True))
    (decision,) = trail.read(mlflow(shelf), NAME)
    assert decision.breached == "max_kl"
    assert "although it failed the gate (max_kl)" in mlflow(shelf).get_model_version(NAME, "4").description


def test_a_rejected_version_is_no_candidate_and_registering_it_again_does_not_make_it_one(shelf: Workspace) -> None:
    reject(shelf, NAME, 3, why("praises everything"))
    assert aliases(shelf) == {}
    assert told(shelf) == [("rejected", 3, None, None)]
    reject(shelf, NAME, 4, why("KL"))
    promote(shelf, NAME, 2, why())
    with pytest.raises(ConfigError, match=rf"is the champion — .*rollback 2 --reason \.\.\. --model {NAME}`"):
        reject(shelf, NAME, 2, why())
    assert aliases(shelf) == {"champion": 2}
    assert told(shelf)[1:] == [("rejected", 4, None, None), ("promoted", 2, 2, None)]


def test_a_person_has_the_last_word_over_the_register_stage(
    registered_once: Workspace, shelf: Workspace, tmp_path: Path
) -> None:
    """The same evidence again, by hand or because someone asked for it with --force."""
    for folder in ("data", "metrics", "reports", "models"):
        shutil.copytree(registered_once.root / folder, shelf.root / folder)
    fresh = register_another(shelf, seed=8)
    reject(shelf, NAME, fresh, why("praises everything"))
    result = register.run(params(), shelf)
    assert result.metrics["model_version"] == fresh
    assert "praises everything" in result.summary
    assert "candidate" not in aliases(shelf)
    assert "praises everything" in mlflow(shelf).get_model_version(NAME, str(fresh)).description
    set_by_hand(shelf, "champion", 1)
    write(shelf, "evaluate", GOOD | {"judge_win_rate": 0.9, "champion_version": 1, "judge_win_rate_champion": 0.7})
    beside = register.run(params(), shelf).metrics["model_version"]
    assert told(shelf)[-1] == ("set by hand", 1, 1, None), "the register stage has seen it"
    tags = mlflow(shelf).get_model_version(NAME, str(beside)).tags
    assert (tags["champion.version"], tags["champion.difference.judge_win_rate"]) == ("1", "+0.2")
    assert tags["champion.difference.kl"] == "+0", "not measured here: from the champion's own evaluation"
    assert aliases(shelf) == {"candidate": beside, "champion": 1}


def test_rollback_goes_back_step_by_step_and_to_any_champion_of_before(shelf: Workspace) -> None:
    for version in (1, 2, 3):
        promote(shelf, NAME, version, why())
    rollback(shelf, NAME, 3, why("repeats itself"))
    assert aliases(shelf) == {"champion": 2}
    assert told(shelf)[-1] == ("rolled back", 2, 2, 3)
    rollback(shelf, NAME, 2, why("this one, too"))
    assert aliases(shelf) == {"champion": 1}, "not back to what was rolled back"
    with pytest.raises(ConfigError, match="version 1 — replaced no champion"):
        rollback(shelf, NAME, 1, why())
    rollback(shelf, NAME, 3, why("it was the prompt"))
    assert aliases(shelf) == {"champion": 3}
    with pytest.raises(ConfigError, match="version 4 — was never champion"):
        rollback(shelf, NAME, 4, why())
    assert "version 3 put back as champion after version 1" in mlflow(shelf).get_model_version(NAME, "1").description


def test_what_was_done_by_hand_is_understood_recorded_and_undone(shelf: Workspace) -> None:
    promote(shelf, NAME, 1, why())
    set_by_hand(shelf, "champion", 4)
    rollback(shelf, NAME, 4, why("who did this?"))
    assert aliases(shelf) == {"candidate": 3, "champion": 1}
    assert told(shelf)[1:] == [("set by hand", 4, 4, 1), ("rolled back", 1, 1, 4)]
    mlflow(shelf).delete_registered_model_alias(NAME, "champion")
    rollback(shelf, NAME, 1, why("put it back"))
    assert told(shelf)[3:] == [("taken away by hand", 1, None, 1), ("rolled back", 1, 1, None)]
    set_by_hand(shelf, "champion", 2)
    reject(shelf, NAME, 3, why())  # a decision in between
    promote(shelf, NAME, 2, why("it was me"))  # says who and why
    assert told(shelf)[5:] == [("set by hand", 2, 2, 1), ("rejected", 3, 2, 2), ("promoted", 2, 2, 1)]
    with pytest.raises(ConfigError, match="is the champion already"):
        promote(shelf, NAME, 2, why())
    mlflow(shelf).delete_model_version(NAME, "2")
    with pytest.raises(ConfigError, match=r"version 2 — there is no such version \(there are: 1, 3, 4\)"):
        rollback(shelf, NAME, 2, why())
    rollback(shelf, NAME, 1, why("the champion was deleted"))
    assert aliases(shelf) == {"champion": 1}


def test_a_decision_made_on_an_old_view_is_refused(shelf: Workspace) -> None:
    promote(shelf, NAME, 1, why(expected="none"))
    set_by_hand(shelf, "champion", 2)
    with pytest.raises(IntegrityError, match="champion is 2, not 1; champion is version 2, set by hand"):
        promote(shelf, NAME, 3, why(expected="1"))
    assert aliases(shelf) == {"candidate": 3, "champion": 2}
    promote(shelf, NAME, 3, why(expected="2"))
    assert aliases(shelf) == {"champion": 3}


@pytest.mark.fault("31: two people promote at once", expected="one after the other; the trail has both, in a chain")
def test_promotions_at_once_end_in_one_state(shelf: Workspace, seen: Callable[[str], None]) -> None:
    """In four processes; every decision but the first replaced the one before it."""
    knowing = Statement.of("mine", despite_gate=True)
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as processes:
        for done in [processes.submit(promote, shelf, NAME, version, knowing) for version in (1, 2, 3, 4)]:
            done.result()
    decisions = trail.read(mlflow(shelf), NAME)
    assert {d.version for d in decisions} == {1, 2, 3, 4}
    assert [d.replaced for d in decisions] == [None, *(d.champion for d in decisions[:-1])]
    assert aliases(shelf) == {"champion": decisions[-1].champion}
    seen("four decisions, each replaced the one before it, the alias is the last one's")


@pytest.mark.fault("31: two people promote at once having seen the same champion", expected="the second is refused")
def test_of_two_that_expect_the_same_champion_one_is_told(shelf: Workspace) -> None:
    def attempt(version: int) -> str:
        try:
            return str(promote(shelf, NAME, version, why(expected="none")))
        except IntegrityError as error:
            return f"refused: {error}"

    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(attempt, (1, 2, 3)))
    assert sum(answer.startswith("refused") for answer in answers) == 2
    assert len(told(shelf)) == 1


def test_two_writers_that_no_lock_keeps_apart_lose_no_entry(shelf: Workspace) -> None:
    """On two machines, say: both saw the same last entry."""
    client, decision = mlflow(shelf), trail.Decision("rejected", 1, None, None, "ada", "2026-01-01T00:00:00Z", "")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: trail.append(client, NAME, decision), range(8)))
    assert len(told(shelf)) == 8


def test_the_trail_has_room_for_any_reason_and_the_page_for_many_decisions(shelf: Workspace) -> None:
    reasons = ['"' * 1000, "\\" * 1000, "\U0001f600" * 1000]
    for reason in reasons:
        reject(shelf, NAME, 4, Statement.of(reason, by="a" * 200))
    client = mlflow(shelf)
    assert [d.reason for d in trail.read(client, NAME)] == reasons
    assert max(len(value) for value in client.get_registered_model(NAME).tags.values()) < trail.LIMIT
    page = client.get_model_version(NAME, "4")
    assert len(page.description) <= model_card.LIMIT
    assert "### Use" in page.description
    assert len(page.tags["decision"]) <= 500
    with pytest.raises(ConfigError, match="--reason — has 1,001 characters"):
        Statement.of("x" * 1001)
    with pytest.raises(ConfigError, match="--by — is empty"):
        Statement.of("x", by="\x1b ")
    assert Statement.of("a\x1b[31m\tb").reason == "a[31m b", "nothing that a terminal obeys"


def test_a_page_that_someone_wrote_anew_gets_the_decision_on_top(shelf: Workspace) -> None:
    mlflow(shelf).update_model_version(NAME, "1", description="Mine.\n\n### Notes\n\nkept")
    promote(shelf, NAME, 1, why())
    description = mlflow(shelf).get_model_version(NAME, "1").description
    assert description.startswith("### Review\n\n- ")
    assert description.endswith("Mine.\n\n### Notes\n\nkept")


def test_a_damaged_entry_is_named(shelf: Workspace) -> None:
    promote(shelf, NAME, 1, why())
    (key,) = [key for key in mlflow(shelf).get_registered_model(NAME).tags if key.startswith(trail.PREFIX)]
    mlflow(shelf).set_registered_model_tag(NAME, key, "edited")
    with pytest.raises(IntegrityError, match=rf"tag {key} — is no longer a decision"):
        promote(shelf, NAME, 2, why())
    assert aliases(shelf)["champion"] == 1
