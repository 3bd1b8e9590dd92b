"""A checkpoint is complete or absent, runs no code, and restores everything."""

import os
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import nn

from training import checkpoint
from training.checkpoint import CheckpointError, TrainState

CONFIG = {"arch": "resnet18", "optim": {"lr": 0.03, "milestones": (0.6, 0.8)}, "seed": 0}


def _state(step: int = 3) -> TrainState:
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    return TrainState(
        step=step,
        epoch=1,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=torch.amp.GradScaler("cpu").state_dict(),
        loader={"epoch": 1, "position": 24},
        generators=checkpoint.generator_states(),
        config=CONFIG,
        meta={"arch": "resnet18"},
    )


def test_everything_is_restored(tmp_path: Path) -> None:
    state, path = _state(), tmp_path / "deep" / "checkpoint.pt"
    checkpoint.save_checkpoint(path, state)
    loaded = checkpoint.load_checkpoint(path, CONFIG)
    assert (loaded.step, loaded.epoch, loaded.loader, loaded.meta) == (3, 1, state.loader, state.meta)
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in state.model.items())
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model.load_state_dict(loaded.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    optimizer.load_state_dict(loaded.optimizer)
    momentum = state.optimizer["state"][0]["momentum_buffer"]
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], momentum)
    assert list(tmp_path.rglob("*.partial")) == []


def test_generators_continue_from_a_saved_state() -> None:
    torch.manual_seed(5)
    states = checkpoint.generator_states()
    want = torch.rand(4)
    torch.manual_seed(6)
    checkpoint.restore_generators(states)
    assert torch.equal(torch.rand(4), want)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, _state(3))

    def disk_full(content: object, file: IO[bytes]) -> None:
        file.write(b"half of a check")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(path, _state(4))
    assert checkpoint.load_checkpoint(path).step == 3
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_file_is_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> Path:
        done.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    checkpoint.write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert done == [".file.partial", "rename", tmp_path.name]


class _Hostile:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.flag),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path, flag = tmp_path / "hostile.pt", tmp_path / "ran"
    torch.save({"step": _Hostile(flag)}, path)
    with pytest.raises(CheckpointError, match=r"holds \w+\.mkdir, which could run code"):
        checkpoint.load_checkpoint(path)
    assert not flag.exists()


def test_missing_cut_empty_and_foreign_files_have_their_own_messages(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*checkpoint\.pt"):
        checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(path, _state())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-10], b"", b"hello world"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cut short or not a checkpoint .*use an older one"):
            checkpoint.load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of this project.*found \['weights'\]"):
        checkpoint.load_checkpoint(path)


def test_another_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, _state())
    other = {"arch": "resnet50", "optim": {"lr": 0.03, "milestones": [0.6, 0.8]}, "epochs": 2}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_checkpoint(path, other)
    message = str(caught.value)
    assert "arch: 'resnet18' then, 'resnet50' now" in message
    assert "epochs: 'absent' then, 2 now" in message and "seed: 0 then, 'absent' now" in message
    assert "optim" not in message


def test_values_that_cannot_be_read_back_are_not_written(tmp_path: Path) -> None:
    state = _state()
    state.loader = {"cursor": [Path("x")]}
    with pytest.raises(TypeError, match=r"loader\.cursor\[0\] is a PosixPath"):
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", state)
    state = _state()
    state.config = {"lr": float("nan")}
    with pytest.raises(TypeError, match="config cannot be written as JSON"):
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", state)
    assert list(tmp_path.iterdir()) == []


def test_latest_and_prune(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 100, 20):
        checkpoint.checkpoint_path(tmp_path, step).touch()
    (tmp_path / "checkpoint_best.pt").touch()
    (tmp_path / ".checkpoint_000000200.pt.partial").touch()
    assert checkpoint.latest(tmp_path) == checkpoint.checkpoint_path(tmp_path, 100)
    checkpoint.prune(tmp_path, keep=2)
    left = {checkpoint.checkpoint_path(tmp_path, step).name for step in (20, 100)}
    assert {path.name for path in tmp_path.iterdir()} == left | {"checkpoint_best.pt"}
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.prune(tmp_path, keep=0)
