"""Prefetching, the bound on running ahead, and kept memory, as far as a CPU can show them."""

import dataclasses
import itertools
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.batch import Batch, tensors_of
from pipelines import build_loader
from pipelines.device import RunAheadLimit, prefetch
from pipelines.recipe import Mixing, moco_v2

PROGRAM = """
import resource, sys
from pipelines.device import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
def step():
    for _ in range(2):
        torch.ones(2 ** 24)
for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    faults = {}
    for way in ("returned", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True
        )
        faults[way] = int(done.stdout)
    # 64 MiB, which glibc always maps anew, are 16,384 small pages, or 32 large ones.
    assert faults["returned"] >= 4 * 2 * 32 > 10 * faults["kept"]


class _Event:
    """A GPU's event that has occurred, or that occurs only when it is waited for."""

    def __init__(self, over: bool, waited: list["_Event"]) -> None:
        self._over, self._waited = over, waited

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self._over

    def synchronize(self) -> None:
        self._waited.append(self)


@pytest.mark.parametrize("over", [True, False])
def test_the_host_waits_for_the_oldest_batch_beyond_the_limit(
    over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead = RunAheadLimit(torch.device("cuda", 0), limit=4)
    waited: list[_Event] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: _Event(over, waited))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    for _ in range(10):
        run_ahead.mark()
    assert len(run_ahead) == (0 if over else 4)
    assert over or len(waited) == 6


def test_each_batch_is_made_before_the_one_before_it_is_used() -> None:
    seen: list[str] = []

    def numbers() -> Iterator[int]:
        try:
            for number in range(3):
                seen.append(f"made {number}")
                yield number
        finally:
            seen.append("closed")

    def use(number: int) -> None:
        seen.append(f"used {number}")

    for number in prefetch(numbers(), lambda _: [], torch.device("cpu")):
        use(number)
    assert seen == ["made 0", "made 1", "used 0", "made 2", "used 1", "closed", "used 2"]

    seen.clear()
    for number in prefetch(numbers(), lambda _: [], torch.device("cpu")):
        use(number)
        break
    assert seen == ["made 0", "made 1", "used 0", "closed"]


RECIPE = dataclasses.replace(moco_v2(48), mixing=Mixing(method="both", grid_size=4, symmetric=True))


def _same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second), strict=True))


def test_prefetching_changes_neither_batches_nor_the_cursor(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader() -> object:
        return build_loader(beton, RECIPE, batch_size=8, seed=3)

    expected = list(loader())
    assert len(tensors_of(expected[0])) == 4 + 4 * 3
    monkeypatch.setattr("pipelines.loader._ASYNC_DEVICES", {"cpu"})
    ahead = loader()
    assert all(_same(a, b) for a, b in zip(ahead, expected, strict=True))
    assert ahead.state_dict()["batches_done"] == 0
    for number, _ in enumerate(ahead, start=1):
        state = ahead.state_dict()
        assert state["batches_done"] == number
        if number == 3:
            break
    resumed = loader()
    resumed.load_state_dict(state)
    assert all(_same(a, b) for a, b in zip(resumed, expected[3:], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_batches_made_on_a_side_stream_are_complete_when_they_are_used(compiled: bool, beton: Path) -> None:
    expected = list(build_loader(beton, RECIPE, batch_size=8, seed=3))
    busy = torch.randn(4096, 4096, device="cuda")
    on_gpu = build_loader(beton, RECIPE, batch_size=8, seed=3, device="cuda", compiled=compiled)
    used = []
    for batch in on_gpu:
        for _ in range(8):
            busy = (busy @ busy).clamp_(-1, 1)
        # Reads are queued behind other work on the current stream, long after the batch is deleted.
        used.append([tensor + 0 * busy[0, 0] for tensor in tensors_of(batch)])
        del batch
    for gpu, cpu in zip(used, expected, strict=True):
        for tensor, other in zip(gpu, tensors_of(cpu), strict=True):
            assert (tensor.cpu() - other).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_does_not_grow_with_the_epochs(beton: Path) -> None:
    loader = build_loader(beton, RECIPE, batch_size=8, device="cuda")
    reserved = []
    for epoch in range(10):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        reserved.append(torch.cuda.memory_reserved())
    # The GPU's speed decides when memory is freed, so an epoch may need another block; a leak shows in all.
    assert any(after <= before for before, after in itertools.pairwise(reserved[1:]))
