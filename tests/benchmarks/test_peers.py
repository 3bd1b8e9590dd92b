"""Each peer makes its batches from real images, and crops the given boxes."""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.peers import ALL_GPU_PEERS, ALL_PEERS, PeerName, load_gpu_peers, load_peers
from benchmarks.peers.contract import (
    DALI_GPU_ONCE,
    DALI_GPU_TWICE,
    DALI_ONCE,
    DALI_TWICE,
    DECODE_LIMIT,
    FFCV,
    OURS,
    OURS_DALI,
    OURS_GPU_DECODES,
    OURS_ON_SHARDS,
    OURS_STREAM,
    SPDL_FFMPEG,
    SPDL_TORCHVISION,
    TORCHVISION_GPU,
    TORCHVISION_PIL,
    TORCHVISION_V2,
    FixedCrops,
    Job,
    Peer,
    PeerWork,
)
from benchmarks.peers.ours import PEER
from benchmarks.pixel_error import choose_crops, pixel_error, reference_crops
from pipelines.recipe import moco_v2

_SIDE, _BATCH = 32, 4
# The largest mean difference from PIL's crops, in grey levels. A box off by one pixel costs at least
# _OFF_BY_ONE. Without AVX2 torchvision's resize rounds differently, 0.14 here.
_OFF_BY_ONE = 5.0
_LARGEST_MEAN_ERROR = {
    OURS: 0.5,
    OURS_ON_SHARDS: 0.5,
    OURS_DALI: 0.5,
    OURS_STREAM: 0.5,
    TORCHVISION_PIL: 0.0,
    TORCHVISION_V2: 0.2,
    FFCV: 2.0,
    DALI_ONCE: 1.5,
    DALI_TWICE: 1.5,
    OURS_GPU_DECODES: 1.0,
    DALI_GPU_ONCE: 1.5,
    DALI_GPU_TWICE: 1.5,
    TORCHVISION_GPU: 0.2,
    SPDL_FFMPEG: 4.0,
    SPDL_TORCHVISION: 0.2,
}
NEEDS_DALI = pytest.mark.needs("nvidia.dali")


@pytest.fixture(scope="module")
def job(picture_folder: Path, beton: Path, shards: Path) -> Job:
    # Loader processes come from a server that has imported once what they need.
    preloaded = ["benchmarks.peers.with_torchvision"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    return Job(picture_folder, beton, shards, moco_v2(_SIDE), _BATCH, 1)


@pytest.fixture(scope="module")
def fixed(job: Job) -> FixedCrops:
    return choose_crops(job, 8)


def _peers(name: PeerName) -> list[Peer]:
    try:
        return load_peers([name])
    except ImportError as error:
        # FFmpeg is a system package that `make setup` may not be allowed to install.
        if name == "spdl" and "apt-get install ffmpeg" in str(error):
            pytest.skip(str(error))
        raise


def _first(work: PeerWork, job: Job) -> Any:
    batches = work.open(job)
    with closing(cast(Any, batches)):
        batch: Any = next(batches)
        next(batches)
    # DALI gives its own lists of tensors.
    if isinstance(batch, tuple) and hasattr(batch[0], "as_array"):
        return [torch.from_numpy(np.array(views.as_array())) for views in batch]
    return batch


def _views(batch: Any) -> list[torch.Tensor]:
    """The two views of a batch as (N, 3, S, S), however the peer lays them out."""
    if hasattr(batch, "views"):  # ours
        batch = batch.views
    elif hasattr(batch, "query"):
        batch = [batch.query, batch.key]
    views = list(batch.unbind(1)) if isinstance(batch, torch.Tensor) else list(batch)
    return [view.permute(0, 3, 1, 2) if view.shape[-1] == 3 else view for view in views]


def _check(work: PeerWork, job: Job, dtype: torch.dtype) -> None:
    views = _views(_first(work, job))
    assert [(view.shape, view.dtype) for view in views] == [((_BATCH, 3, _SIDE, _SIDE), dtype)] * 2
    first, second = (view.float() for view in views)
    assert first.std() > 0 and not torch.equal(first, second), "two views of a picture are two crops"


def test_ours(job: Job, fixed: FixedCrops) -> None:
    assert isinstance(PEER.crops, PeerWork) and isinstance(PEER.recipe, PeerWork)
    _check(PEER.crops, job, torch.uint8)
    _check(PEER.recipe, job, torch.float32)
    _check_pixels([PEER], fixed)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ours-dali", marks=NEEDS_DALI),
        pytest.param("ffcv", marks=pytest.mark.needs("ffcv")),
        pytest.param("dali", marks=NEEDS_DALI),
        pytest.param("spdl", marks=pytest.mark.needs("spdl")),
    ],
)
def test_peer_of_threads(name: PeerName, job: Job, fixed: FixedCrops) -> None:
    peers = _peers(name)
    for peer in peers:
        assert isinstance(peer.crops, PeerWork)
        _check(peer.crops, job, torch.uint8)
        if isinstance(peer.recipe, PeerWork):
            _check(peer.recipe, job, torch.float32)
    _check_pixels(peers, fixed)


@pytest.mark.needs("ffcv")
def test_ffcv_does_not_break_other_compiled_functions(job: Job) -> None:
    def total(bytes_N: NDArray[np.uint8]) -> int:
        return int(bytes_N.sum())

    before = numba.njit(total)
    assert before(np.ones(3, np.uint8)) == 3
    (ffcv,) = load_peers(["ffcv"])
    assert isinstance(ffcv.crops, PeerWork)
    _first(ffcv.crops, job)
    assert len(before.nopython_signatures) == 1, "its table of signatures can still be read"
    assert numba.njit(total)(np.ones(3, np.uint8)) == 3


@NEEDS_DALI
def test_gpu_peers_run_on_the_cpu_too(job: Job, fixed: FixedCrops) -> None:
    peers = load_gpu_peers(ALL_GPU_PEERS, torch.device("cpu"))
    assert len({peer.name for peer in peers}) == len(peers) == 7
    for peer in peers:
        assert isinstance(peer.crops, PeerWork) and isinstance(peer.recipe, PeerWork)
        assert peer.crops.settle is None and peer.recipe.settle is None, "there is nothing to wait for"
        _check(peer.crops, job, torch.uint8)
        _check(peer.recipe, job, torch.float32)
    _check_pixels(peers, fixed)


@NEEDS_DALI
def test_on_a_gpu_all_peers_wait_for_it() -> None:
    for peer in load_gpu_peers(ALL_GPU_PEERS, torch.device("cuda", 0)):
        assert (
            cast(PeerWork, peer.crops).settle is not None and cast(PeerWork, peer.recipe).settle is not None
        )


def test_torchvision(job: Job, fixed: FixedCrops) -> None:
    # Starting processes is slow, so each of the two peers shows one of its works.
    pil, v2 = load_peers(["torchvision-pil", "torchvision-v2"])
    assert isinstance(pil.crops, PeerWork) and isinstance(v2.recipe, PeerWork)
    _check(pil.crops, job, torch.uint8)
    _check(v2.recipe, job, torch.float32)
    _check_pixels([pil, v2], fixed)


@pytest.mark.needs("simplejpeg")
def test_decode_limit(job: Job) -> None:
    (peer,) = load_peers(["decode"])
    assert isinstance(peer.crops, PeerWork) and peer.name == DECODE_LIMIT and peer.crops.one_thread
    assert _first(peer.crops, job) is None


def _check_pixels(peers: list[Peer], fixed: FixedCrops) -> None:
    reference = reference_crops(fixed)
    for peer in peers:
        error = pixel_error(peer, fixed, reference)
        # Our way of decoding on a GPU has variants.
        limit = _LARGEST_MEAN_ERROR[OURS_GPU_DECODES if OURS_GPU_DECODES in peer.name else peer.name]
        assert cast(float, error["mean_error"]) <= limit, (peer.name, error)


def test_pixel_error_would_show_a_shifted_box(fixed: FixedCrops) -> None:
    boxes_NV4 = fixed.boxes_NV4.copy()
    boxes_NV4[:, :, :2] = np.maximum(boxes_NV4[:, :, :2] - 1, 0)
    (pil,) = load_peers(["torchvision-pil"])
    error = pixel_error(pil, replace(fixed, boxes_NV4=boxes_NV4), reference_crops(fixed))
    assert cast(float, error["mean_error"]) > _OFF_BY_ONE


def test_a_missing_package_is_an_error_that_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.peers.decode_limit", raising=False)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ImportError, match=r"peer decode needs .*simplejpeg.*make setup.*\[bench\].*--peers"):
        load_peers(["decode"])


def test_missing_dali_is_reported_before_our_loader_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"peer ours-dali needs .*nvidia\.dali.*\[dali\].*--peers"):
        load_peers(["ours-dali"])


@NEEDS_DALI
def test_our_peers_use_the_set_and_the_backend_of_their_names(job: Job, fixed: FixedCrops) -> None:
    nowhere = Path("nowhere")
    ours = {peer.name: peer for peer in (PEER, *load_peers(["ours-dali"]))}
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        cast(Any, ours[OURS].fixed_crops)(replace(fixed, beton=nowhere / "x.beton"))
    for name in (OURS_ON_SHARDS, OURS_DALI, OURS_STREAM):
        crops = cast(Any, ours[name].fixed_crops)(replace(fixed, beton=nowhere / "x.beton"))
        same = np.array_equal(crops, cast(Any, PEER.fixed_crops)(fixed))
        # The same kernels cut the same pixels out of the same decoder's planes; DALI decodes to RGB.
        assert same == (name == OURS_ON_SHARDS)


@pytest.mark.needs("nvidia.dali", "ffcv", "simplejpeg")
def test_every_peer_describes_its_setup_or_why_it_is_left_out() -> None:
    names: Iterator[PeerName] = (name for name in ALL_PEERS if name != "spdl")
    for peer in load_peers(list(names)):
        for work in (peer.crops, peer.recipe):
            assert len(work if isinstance(work, str) else work.configured) > 20, peer.name
