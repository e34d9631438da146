"""Faults of models: pickles that are never executed, files that were cut, bits that were flipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ingested import ingest, outputs, run
from safetensors.torch import load_file, save_file

from tasks.data.sources import digest
from tasks.seals import SEAL
from tasks.workspace import Workspace

pytest_plugins = ["ingested"]

Seen = Callable[[str], None]


class Canary:
    """Whoever unpickles it makes the folder `executed`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place / "executed"),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A pickled checkpoint."""
    torch.save({"weights": Canary(tmp_path)}, tmp_path / "canary.bin")
    assert b"mkdir" in (tmp_path / "canary.bin").read_bytes()
    return tmp_path / "canary.bin"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.gguf"])
@pytest.mark.fault("30: a pickled model as source", expected="exit 3, nothing executed")
def test_a_pickled_model_is_refused_and_not_executed(
    used: Workspace, canary: Path, name: str, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    (used.own_data / "policy" / "model.safetensors").unlink()
    shutil.copy(canary, used.own_data / "policy" / name)
    inside = "ingest.policy.file=" + ("model.gguf" if name.endswith("gguf") else "''")
    before = outputs(used)
    assert ingest(used, "good.jsonl", None, inside) == 3
    assert "Error: " in capsys.readouterr().err
    assert not (canary.parent / "executed").exists()
    assert outputs(used) == before
    seen("exit 3, not executed")


@pytest.mark.parametrize("folder", ["base_model", "judge_base"])
@pytest.mark.fault("30: a pickle put where ingest wrote a model", expected="exit 4, nothing executed")
def test_a_pickle_in_place_of_a_model_is_noticed_and_not_executed(
    used: Workspace, canary: Path, folder: str, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    place: Path = getattr(used, folder)
    (place / "model.safetensors").unlink()
    shutil.copy(canary, place / "pytorch_model.bin")
    assert run(used, "reward_model") == 4
    assert f"{place.relative_to(used.root)}/pytorch_model.bin — SHA-256 is" in capsys.readouterr().err
    # Also where no seal says that it is another's.
    (place / SEAL).unlink()
    if folder == "base_model":
        assert run(used, "reward_model") == 4
        assert "models/base — does not load" in capsys.readouterr().err
    assert not (canary.parent / "executed").exists()
    seen("exit 4, not executed")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.fault("10: a model's file that was cut, as source", expected="exit 3, the folder")
def test_a_model_with_a_file_that_was_cut_is_refused(
    used: Workspace, name: str, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    whole = (used.own_data / "policy" / name).read_bytes()
    before = outputs(used)
    for share in (0.0, 0.01, 0.5, 0.99):
        (used.own_data / "policy" / name).write_bytes(whole[: int(share * len(whole))])
        assert ingest(used, "good.jsonl", None) == 3
        assert "data/own/policy" in capsys.readouterr().err
    assert outputs(used) == before
    seen("exit 3 at each of 4 cuts")


@pytest.mark.fault("15: weights that are not finite", expected="exit 3, the tensor")
def test_weights_that_are_not_finite_are_refused(
    used: Workspace, capsys: pytest.CaptureFixture[str], seen: Seen
) -> None:
    weights = used.own_data / "policy" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    assert ingest(used, "good.jsonl", None) == 3
    assert "holds weights that are not finite: model.norm.weight" in capsys.readouterr().err
    seen("exit 3")


@pytest.mark.fault("11: a tensor missing", expected="source: exit 3; after ingest: exit 4; its name")
def test_a_missing_tensor_is_named(used: Workspace, capsys: pytest.CaptureFixture[str], seen: Seen) -> None:
    for place, code in ((used.own_data / "policy", 3), (used.base_model, 4)):
        tensors = load_file(place / "model.safetensors")
        del tensors["model.layers.3.mlp.up_proj.weight"]
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (used.base_model / SEAL).unlink(missing_ok=True)  # what the loader itself says
        assert (ingest(used, "good.jsonl", None) if code == 3 else run(used, "reward_model")) == code
        assert "weights model.layers.3.mlp.up_proj.weight" in capsys.readouterr().err.replace("weights:", "weights")
    seen("exit 3 and 4, its name")


@pytest.mark.parametrize(
    "path", ["data/canonical/pairs.parquet", "models/base/model.safetensors", "models/judge_base/tokenizer.json"]
)
@pytest.mark.fault("9: a bit flipped in data or a model, its time as before", expected="exit 4, file, both digests")
def test_a_flipped_bit_is_noticed(used: Workspace, path: str, capsys: pytest.CaptureFixture[str], seen: Seen) -> None:
    file = used.root / path
    before, times = digest(file), file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(used, "validate") == 4
    message = capsys.readouterr().err
    assert f"{file.relative_to(used.root)} — SHA-256 is {digest(file)}, was {before} when written — remove" in message
    seen("exit 4, file, both digests")
