"""Checkpoints on a disk that fills up, that damages files, and that two processes write to."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import deque, namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killing import Stages
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import event
from stores import RECORD, trained_weights
from tiny import REPOSITORY, tiny_params

from ppo_core.checkpoint import save_checkpoint, verify_checkpoint
from ppo_core.errors import IntegrityError, ResourceError
from tasks import ppo
from tasks.errors import Locked
from tasks.params import check_params, load_params
from tasks.tracking import Tracker, tracking_uri
from tasks.workspace import Workspace

pytest_plugins = ["stores", "trainings"]
Usage = namedtuple("Usage", "total used free")
TENSORS = {"a.safetensors": {"x": torch.arange(5000, dtype=torch.float32)}, "b.safetensors": {"y": torch.ones(3)}}
PLAIN = {"plain.json": {"iteration": 3, "kl": {"coef": 0.05}}}
FILES_OF_64K = """
import resource, signal, sys, torch
from pathlib import Path
from ppo_core.checkpoint import save_checkpoint
from ppo_core.errors import ResourceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_checkpoint(Path(sys.argv[1]), {"a.safetensors": {"x": torch.zeros(int(sys.argv[2]))}}, {"b.json": sys.argv[3]})
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "cycle_001", TENSORS, PLAIN)
    return tmp_path / "cycle_001"


@pytest.mark.fault("8: no room for a checkpoint", expected="exit 8, free and needed bytes; what is there stays")
def test_room_is_asked_for_before_anything_is_written(
    saved: Path, monkeypatch: pytest.MonkeyPatch, seen: Callable[[str], None]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 4321, 4321))
    with pytest.raises(ResourceError, match=r"4321 bytes are free, about 10\d{5} are needed") as refused:
        save_checkpoint(saved.with_name("cycle_002"), TENSORS, PLAIN)
    verify_checkpoint(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["cycle_001"]
    assert refused.value.exit_code == 8
    seen("exit 8, 4321 free, about 1068588 needed, nothing left behind")


@pytest.mark.fault("8: the disk fills while a checkpoint is written", expected="exit 8; what is there stays")
@pytest.mark.parametrize(("numbers", "text"), [(30000, "x"), (10, "x" * 70000)], ids=["tensors", "plain"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    saved: Path, numbers: int, text: str, seen: Callable[[str], None]
) -> None:
    place = saved.with_name("cycle_002")
    command = [sys.executable, "-c", FILES_OF_64K, str(place), str(numbers), text]
    full = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert full.returncode == 8, full.stderr
    assert "the disk has no room" in full.stdout
    verify_checkpoint(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["cycle_001"]
    seen("exit 8, the last one verified, nothing half-written left")


@pytest.mark.fault("8: the disk of MLflow's data base fills", expected="exit 8; recorded once when there is room")
def test_a_full_data_base_of_mlflow_is_told_and_made_up_for(
    home: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture, seen: Callable[[str], None]
) -> None:
    params, weights = check_params(tiny_params()), trained_weights(home, tmp_path / "trained.safetensors")
    full = True

    def limit(connection: sqlite3.Connection, _: object) -> None:
        most = connection.execute("PRAGMA page_count").fetchone()[0] if full else 2**31
        connection.execute(f"PRAGMA max_page_count = {most}")

    engine = SqlAlchemyStore._get_or_create_engine(tracking_uri(home))  # the one that clients of this store share
    engine.dispose()
    event.listen(engine, "connect", limit)
    with pytest.raises(ResourceError, match=r"the disk is full.*make room") as refused:
        Tracker.open(home, "f" * 64, params)
    assert refused.value.exit_code == 8

    full = False
    engine.dispose()
    with Tracker.open(home, "f" * 64, params) as tracker:
        full = True
        engine.dispose()
        cycles = itertools.count(1)
        with pytest.raises(ResourceError, match="the disk is full"):
            deque(tracker.log_cycle(RECORD | {"cycle": cycle}, weights) for cycle in cycles)  # the pages have room left
        full = False
        engine.dispose()
    steps = [point.step for point in tracker.client.get_metric_history(tracker.run_id, "train/kl")]
    assert steps == list(range(1, next(cycles)))
    seen(f"exit 8 at the start and at cycle {steps[-1]}; afterwards {len(steps)} points for as many cycles")


@pytest.mark.fault("8: no room for the next cycle", expected="exit 8 before it is trained, not after")
def test_a_cycle_that_could_not_be_saved_is_not_trained(
    training: Workspace, monkeypatch: pytest.MonkeyPatch, seen: Callable[[str], None]
) -> None:
    with ppo.open_run(load_params(training.params), training) as run:
        trainer = run._ready()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 4321, 4321))
        with pytest.raises(ResourceError, match="4321 bytes are free"):
            run.next_cycle()
        assert trainer.iteration == 0
        monkeypatch.undo()
        assert run.next_cycle()["cycle"] == 1, "with room again it goes on"
    seen("exit 8, no iteration done")


@pytest.mark.fault("9: a flipped byte in a checkpoint, 200 places", expected="all noticed, file and digests named")
def test_every_flipped_byte_is_noticed(saved: Path, seen: Callable[[str], None]) -> None:
    draw, files = random.Random(0), sorted(saved.iterdir())
    assert len(files) == 4
    for number in range(200):
        path = files[number % 4]
        content = bytearray(path.read_bytes())
        at = draw.randrange(len(content))
        content[at] ^= 1 << draw.randrange(8)
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="cycle_001") as noticed:
            verify_checkpoint(saved)
        assert noticed.value.exit_code == 4
        path.write_bytes(whole)
    verify_checkpoint(saved)
    seen("200 of 200")


@pytest.mark.fault("10: a file of a checkpoint cut short", expected="exit 4, file named")
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_noticed(saved: Path, share: float) -> None:
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(IntegrityError, match="cycle_001"):
            verify_checkpoint(saved)
        path.write_bytes(whole)


@pytest.mark.fault("11: a file of a checkpoint missing, or one too many", expected="exit 4, file named")
def test_files_are_those_that_were_written(saved: Path) -> None:
    (saved / "b.safetensors").rename(saved / "c.safetensors")
    with pytest.raises(IntegrityError, match=r"b\.safetensors — SHA-256 is no file"):
        verify_checkpoint(saved)
    shutil.copy(saved / "c.safetensors", saved / "b.safetensors")
    with pytest.raises(IntegrityError, match=r"c\.safetensors — .* was not there when written"):
        verify_checkpoint(saved)
    (saved / "c.safetensors").unlink()
    verify_checkpoint(saved)
    (saved / "manifest.json").write_text(json.dumps(["a"]), encoding="utf-8")
    with pytest.raises(IntegrityError, match="no readable manifest"):
        verify_checkpoint(saved)


def test_a_checkpoint_is_never_written_over(saved: Path) -> None:
    with pytest.raises(FileExistsError):
        save_checkpoint(saved, TENSORS, PLAIN)
    verify_checkpoint(saved)


def test_what_a_dead_process_was_writing_is_swept(training: Workspace) -> None:
    with ppo.open_run(load_params(training.params), training) as run:
        folder = run.folder.path
    for name in (".cycle_001.writing", ".state_001.writing"):
        (folder / name).mkdir()
        (folder / name / "tensors.safetensors").touch()
    with ppo.open_run(load_params(training.params), training):
        assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "lock"]


@pytest.mark.fault("21: one training from two places at once", expected="exit 6 at once, holder named")
def test_a_training_that_another_process_continues_is_refused(
    training: Workspace, server: Stages, seen: Callable[[str], None]
) -> None:
    log = training.root / "log"
    with ppo.open_run(load_params(training.params), training) as run:
        assert server.run(["ppo", "--workspace", str(training.root)], log) == 6
        told = log.read_text().splitlines()[-1]
        assert told.startswith(f"Locked: {run.folder.path / 'lock'} — another run holds the training {run.fingerprint}")
        with pytest.raises(Locked):
            ppo.open_run(load_params(training.params), training)
    seen("exit 6, process and time of its start named")


def test_states_are_kept_as_asked(training: Workspace) -> None:
    params = load_params(training.params, ["ppo.cycles=3", "ppo.keep_states=2"])
    result = ppo.run(params, training)
    folder = training.runs / result.metrics["fingerprint"]
    assert [path.name for path in sorted(folder.glob("*_0*"))] == [
        *("cycle_001", "cycle_002", "cycle_003"),
        *("state_002", "state_003"),
    ]
    fewer = load_params(training.params, ["ppo.cycles=3", "ppo.keep_states=1"])
    with ppo.open_run(fewer, training) as run:
        assert run.folder.path == folder, "what is kept does not change what the run is"
        assert run.stopped == "cycles"
    assert [path.name for path in folder.glob("state_*")] == ["state_003"]
