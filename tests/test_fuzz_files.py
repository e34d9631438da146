"""Damaged models and checkpoints: sound, or refused with what is wrong. Never another exception."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from test_fuzz import Seen, damaged, places, problems

from ppo_core.checkpoint import MANIFEST, load_plain, load_tensors, save_checkpoint, verify_checkpoint
from tasks.data.sources import Fetched
from tasks.errors import IntegrityError
from tasks.models.base_models import write_judge, write_policy
from tasks.params import check_params
from tasks.workspace import Workspace

ODD = [None, -1, 0, 10**30, 1.5, "", "x", [], {}, [None], {"a": 1}, True, "gpt2", "bert"]


def odd(file: Path, draw: random.Random) -> None:
    """Put a strange value, or none, somewhere into a JSON file; damage another one."""
    if file.suffix != ".json":
        file.write_bytes(damaged(file.read_bytes()[:4000], draw) + file.read_bytes()[4000:])
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    place = draw.choice([path for path in places(content) if path][:200])
    node = content
    for key in place[:-1]:
        node = node[key]
    if draw.random() < 0.3:
        del node[place[-1]]
    else:
        node[place[-1]] = draw.choice(ODD)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.fault("fuzz: 40 damaged models", expected="a sound model, or exit 3")
def test_damaged_models(tmp_path: Path, policy_folder: Path, judge_folder: Path, seen: Seen) -> None:
    draw, params, refused = random.Random(7), check_params(tiny.tiny_params()).ingest, 0
    for i in range(40):
        source, place, target = draw.choice((policy_folder, judge_folder)), tmp_path / f"in{i}", tmp_path / f"out{i}"
        shutil.copytree(source, place)
        odd(draw.choice(sorted(place.iterdir())), draw)
        model = Fetched(place, "model", "", "")
        if source == policy_folder:
            said = problems(partial(write_policy, model, target, params, Workspace(tmp_path)))
        else:
            said = problems(partial(write_judge, model, target))
        refused += bool(said)
        assert all(problem.where and len(problem.what) < 500 for problem in said)
    assert 5 < refused < 40
    seen(f"{refused} refused, {40 - refused} sound, none crashed")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weights = {f"layer.{i}": torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"tensors.safetensors": weights}, {"plain.json": {"cycle": 3}, "record.json": {"kl": 1.25}})
    verify_checkpoint(folder)
    return folder


@pytest.mark.fault("9: one byte flipped in a checkpoint, 200 times", expected="exit 4 each time")
def test_every_flipped_byte_of_a_checkpoint_is_noticed(checkpoint: Path, seen: Seen) -> None:
    draw, files = random.Random(11), sorted(checkpoint.iterdir())
    assert [file.name for file in files] == [MANIFEST, "plain.json", "record.json", "tensors.safetensors"]
    noticed = 0
    for i in range(200):
        file = files[i % len(files)]
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(broken))
        with pytest.raises(IntegrityError, match="checkpoint") as caught:
            verify_checkpoint(checkpoint)
        noticed += caught.value.exit_code == 4
        file.write_bytes(whole)
    verify_checkpoint(checkpoint)
    assert load_tensors(files[3])["layer.0"].shape == (7, 5)
    assert load_plain(files[1]) == {"cycle": 3}
    seen(f"{noticed} of 200 noticed")


@pytest.mark.fault("10: a checkpoint's file cut at up to 20 places, or gone", expected="exit 4 each time")
def test_every_cut_file_of_a_checkpoint_is_noticed(checkpoint: Path, seen: Seen) -> None:
    noticed = 0
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        for length in {0, 1, len(whole) - 1, *random.Random(13).choices(range(len(whole)), k=17)}:
            file.write_bytes(whole[:length])
            with pytest.raises(IntegrityError):
                verify_checkpoint(checkpoint)
            noticed += 1
        file.unlink()
        with pytest.raises(IntegrityError):
            verify_checkpoint(checkpoint)
        file.write_bytes(whole)
    seen(f"all {noticed} noticed")
