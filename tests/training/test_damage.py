"""Files of weights with damaged bytes are refused, or hold what was written."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from models.encoders import build_encoder
from models.moco import MoCo
from training import export
from training.checkpoint import (
    CheckpointError,
    TrainState,
    content_hash,
    load_checkpoint,
    read_safely,
    save_checkpoint,
    save_tensors,
)

META = export.BackboneMeta(arch="resnet10w16", feature_dim=128, small_stem=False, mean=(0.5, 0.25, 0.5))


def _moco() -> MoCo:
    torch.manual_seed(0)
    return MoCo(partial(build_encoder, "resnet10w16"), queue_len=8, dim=4)


def _write_backbone(path: Path) -> None:
    export.save_backbone(path, _moco().encoder_q, META)


def _write_checkpoint(path: Path) -> None:
    optimizer = {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], "state": {3: {"step": 1}}}
    state = TrainState(7, 2, _moco().state_dict(), optimizer, meta=META.as_strings(), config={"seed": 1})
    save_checkpoint(path, state)


def _write_published(path: Path) -> None:
    export.save_published(path, epoch=7, arch="resnet10w16", model=_moco().state_dict(), optimizer={})


def _write_plain(path: Path) -> None:
    save_tensors(path, {"model": _moco().encoder_q.state_dict(), "pixel_mean": [123.675, 116.28, 103.53]})


def _as_backbone(path: Path) -> object:
    backbone = export.load_backbone(path)
    return content_hash(backbone.state), backbone.meta


CASES: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], Any]]] = {
    "backbone": ("backbone.safetensors", _write_backbone, _as_backbone),
    "checkpoint as pretrained": ("checkpoint_000000007.pt", _write_checkpoint, _as_backbone),
    "checkpoint resumed": (
        "checkpoint_000000007.pt",
        _write_checkpoint,
        lambda path: content_hash(vars(load_checkpoint(path))),
    ),
    "published": ("checkpoint.pth.tar", _write_published, _as_backbone),
    "detector": ("detectron2.pth", _write_plain, lambda path: content_hash(read_safely(path))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_changed_byte_gives_an_error_or_what_was_written(case: str, tmp_path: Path) -> None:
    name, write, read = CASES[case]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    expected = read(path)
    rng = np.random.default_rng(0)
    # Random places, and the first and last bytes, which hold the tables of both formats.
    places = [
        *rng.integers(0, len(whole), 150),
        *range(0, 1200, 9),
        *range(len(whole) - 1500, len(whole), 11),
    ]
    refused = 0
    for number, place in enumerate(places):
        changed = bytearray(whole)
        changed[place] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            found = read(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert found == expected, f"byte {place} of {len(whole)}"
    assert refused > 150


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """Also from processes with different orders of sets and hash maps."""
    program = (
        "import sys; from pathlib import Path; from tests.training import test_damage as t\n"
        "folder = Path(sys.argv[1])\n"
        "for name, write, _ in t.CASES.values(): write(folder / name)"
    )
    contents = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", program, str(folder)]
        subprocess.run(
            command, check=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]
    file = tmp_path / "1" / "backbone.safetensors"
    with safetensors.safe_open(file, framework="pt") as opened:
        assert list(opened.metadata()) and opened.metadata()["arch"] == "resnet10w16"


def test_a_file_without_a_hash_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"conv1.weight": torch.zeros(2)}
    safetensors.torch.save_file(weights, tmp_path / "timm.safetensors")
    export.load_backbone(tmp_path / "timm.safetensors")
    assert "timm.safetensors carries no hash of its content: it is not checked for damage" in caplog.text
    published = {"arch": "resnet18", "state_dict": {f"encoder_q.{k}": t for k, t in weights.items()}}
    torch.save(published, tmp_path / "new.pth.tar")
    torch.save(published, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    export.load_backbone(tmp_path / "new.pth.tar")
    assert "new.pth.tar carries no hash of its content: only the archive's checksums" in caplog.text
    export.load_backbone(tmp_path / "old.pth.tar")
    assert "old.pth.tar carries no hash of its content: it is not checked for damage" in caplog.text
    caplog.clear()
    _write_backbone(tmp_path / "ours.safetensors")
    export.load_backbone(tmp_path / "ours.safetensors")
    assert not caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.tensor([1.0, 2.5]), "b": [1, 2.0, "x"], "c": {}},
        {"a": torch.tensor([1.0, 2.0]).double(), "b": [1, 2.0, "x"], "c": {}},
        {"a": torch.tensor([[1.0, 2.0]]), "b": [1, 2.0, "x"], "c": {}},
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 2, "x"], "c": {}},
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0], "c": {}},
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0, "x"], "c": []},
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0, "x"]},
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0, "x"], "d": {}},
    ],
)
def test_every_difference_changes_the_hash(changed: dict[str, Any]) -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "b": [1, 2.0, "x"], "c": {}}
    assert content_hash(first) == content_hash(dict(reversed(first.items()))) != content_hash(changed)


def test_damage_of_the_old_format_gives_no_traceback(tmp_path: Path) -> None:
    """Without checksums, damaged weights are not noticed; but no error other than ours occurs."""
    weights = {f"module.encoder_q.{k}": t for k, t in _moco().encoder_q.state_dict().items()}
    path = tmp_path / "old.pth.tar"
    torch.save({"arch": "x", "state_dict": weights}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in (*range(0, 3000, 7), *rng.integers(0, len(whole), 50)):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            export.load_backbone(path)
        except CheckpointError:
            refused += 1
    assert refused > 50
