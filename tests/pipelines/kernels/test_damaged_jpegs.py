"""Damaged JPEGs do not affect others: verdicts and bytes are the same with any other images, in any order."""

import io
import itertools
import os
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from dataset_tools.beton_writer import BetonWriter
from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource
from dataset_tools.verify import verify
from pipelines import build_loader
from pipelines.decode.jpeg import Jpeg, check_jpeg, read_header
from pipelines.decode.pillow import open_image, read_rgb, read_size
from pipelines.kernels import jpeg_crops
from pipelines.kernels.jpeg_crops import HUFFMAN, QUANTISATION, crop_images, missing_table
from pipelines.kernels.resample import SLACK
from pipelines.kernels.turbojpeg import functions
from pipelines.recipe import moco_v2
from pipelines.sets.manifest import skipped_path
from tests.conftest import photograph_like

SOF, DHT, SOS, EOI, DQT = b"\xff\xc0", b"\xff\xc4", b"\xff\xda", b"\xff\xd9", b"\xff\xdb"


def encode(seed: int = 0, width: int = 61, height: int = 47, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    photograph_like(seed, width, height).convert(mode).save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def segments(jpeg: bytes) -> list[bytes]:
    """SOI, each segment before the first scan, and all the rest as one."""
    parts, at = [jpeg[:2]], 2
    while jpeg[at : at + 2] != SOS:
        stop = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        parts.append(jpeg[at:stop])
        at = stop
    return [*parts, jpeg[at:]]


def without(jpeg: bytes, marker: bytes) -> bytes:
    """The JPEG without the segments of one kind before the first scan."""
    return b"".join(part for part in segments(jpeg) if not part.startswith(marker))


def twisted_frame(jpeg: bytes) -> bytes:
    """The JPEG with a wrong number of bits per sample, an error that stops libjpeg inside the header."""
    return b"".join(
        part[:4] + b"\x0d" + part[5:] if part.startswith(SOF) else part for part in segments(jpeg)
    )


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "cut in the header": lambda jpeg: jpeg[:60],
    "cut in the scan": lambda jpeg: jpeg[: len(jpeg) * 3 // 4],
    "two beginnings": lambda jpeg: jpeg[:2] + jpeg,
    "bits a sample": twisted_frame,
    "no Huffman tables": lambda jpeg: without(jpeg, DHT),
    "no quantisation tables": lambda jpeg: without(jpeg, DQT),
    "no frame": lambda jpeg: without(jpeg, SOF),
}


# ------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 1}, {"subsampling": 0}],
)
def test_each_table_that_is_used_must_be_defined(mode: str, options: dict[str, object]) -> None:
    jpeg = encode(mode=mode, **options)
    assert missing_table(np.frombuffer(jpeg, np.uint8)) == 0
    assert check_jpeg(jpeg).state == "whole"
    parts = segments(jpeg)
    for number, part in enumerate(parts):
        if part[:2] in (DHT, DQT):
            cut = b"".join(parts[:number] + parts[number + 1 :])
            assert missing_table(np.frombuffer(cut, np.uint8)) == (
                HUFFMAN if part[:2] == DHT else QUANTISATION
            )
            assert check_jpeg(cut).state == "damaged"
            assert read_header(cut) is None
            assert read_rgb(cut) is None
            assert read_size(cut) is None


def test_a_missing_table_of_a_later_progressive_scan_is_found() -> None:
    jpeg = encode(progressive=True)
    *_, tail = segments(jpeg)
    second = tail.index(DHT)
    stop = second + 2 + int.from_bytes(tail[second + 2 : second + 4])
    cut = jpeg[: len(jpeg) - len(tail)] + tail[:second] + tail[stop:]
    assert missing_table(np.frombuffer(cut, np.uint8)) == HUFFMAN
    assert "Huffman table" in check_jpeg(cut).message


def plain_functions(module: types.ModuleType) -> dict[str, Any]:
    """The kernels of a module as plain Python functions that call each other."""
    names = dict(vars(module))
    for name, value in vars(module).items():
        if hasattr(value, "py_func"):
            names[name] = types.FunctionType(value.py_func.__code__, names)
    return names


PLAIN = plain_functions(jpeg_crops)
SEEDS = [encode(1, 33, 25), encode(2, 24, 31, progressive=True), encode(3, 17, 17, "L")]


@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 2000),
)
@example(seed=b"", changes=[], cut=0)
@example(seed=b"\xff\xd8\xff\xda\x00\x02", changes=[], cut=0)
@example(seed=b"\xff\xd8\xff\xdb\x00\x03", changes=[], cut=0)
@settings(deadline=None, max_examples=300)
def test_markers_are_read_within_bounds(seed: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    mutated = bytearray(seed)
    for place, value in changes:
        if mutated:
            mutated[place % len(mutated)] = value
    data = np.frombuffer(bytes(mutated[: len(mutated) - cut % (len(mutated) + 1)]), np.uint8)
    # Plain Python raises IndexError where compiled code would read past the end.
    assert PLAIN["missing_table"](data) == missing_table(data)
    assert PLAIN["_is_rotated"](data) == jpeg_crops._is_rotated(data)


# ------------------------------------------------------------------------------------------------------------
# Verdicts and pixels


def mutations(num: int) -> list[bytes]:
    """Sound JPEGs, damaged ones of all KINDS, and JPEGs with changed bytes, mixed."""
    rng = np.random.default_rng(5)
    found = []
    for n in range(num):
        sound = encode(n % 7, 40 + n % 9, 33 + n % 5, progressive=n % 4 == 0, subsampling=n % 3)
        match n % 6:
            case 0:
                found.append(sound)
            case 1:
                found.append(list(KINDS.values())[n // 6 % len(KINDS)](sound))
            case _:
                mutated = bytearray(sound)
                for place in rng.integers(2, len(mutated), rng.integers(1, 5)):
                    # Half of the changes are in the header, which sets the decoder's state.
                    mutated[place % 700 if n % 2 else place] = rng.integers(256)
                found.append(bytes(mutated))
    return found


def alone(payload: bytes) -> object:
    """The findings for a JPEG on a thread that has seen no other."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(findings(payload)))
    thread.start()
    thread.join()
    return found[0]


def findings(payload: bytes) -> object:
    header = read_header(payload)
    planes = None
    if header is not None and header.is_yuv420:
        try:
            planes = Jpeg(payload).planes().packed().tobytes()
        except ValueError as error:
            planes = str(error)
    return check_jpeg(payload), header, planes


def test_a_verdict_does_not_depend_on_images_before() -> None:
    payloads = mutations(300)
    expected = [alone(payload) for payload in payloads]
    states = [verdict.state for verdict, *_ in expected]  # type: ignore[misc]
    assert min(states.count("whole"), states.count("damaged")) > 50
    assert [findings(payload) for payload in payloads] == expected
    assert [findings(payload) for payload in reversed(payloads)] == expected[::-1]


def _cropped(payloads: list[bytes], side: int = 16) -> tuple[list[int], list[bytes]]:
    """Statuses and views from one call of the kernel."""
    sizes = [read_size(payload) or (1, 1) for payload in payloads]
    boxes = np.array([[[0, 0, h, w, 0], [0, 0, h, w, 1]] for h, w in sizes], np.int32)
    num_bytes = np.array([len(payload) for payload in payloads])
    data = np.frombuffer(b"".join(payloads) + bytes(SLACK), np.uint8)
    out = np.zeros((len(payloads), 2, side, side, 3), np.uint8)
    status = np.empty(len(payloads), np.int64)
    modes = np.zeros(len(payloads), np.uint8)
    starts = np.cumsum(num_bytes) - num_bytes
    crop_images(functions(), data, starts, num_bytes, modes, np.array(sizes), boxes, out, status)
    return status.tolist(), [view.tobytes() for view in out]


def test_crops_do_not_depend_on_images_before() -> None:
    payloads = mutations(240)
    statuses, views = _cropped(payloads)
    assert 40 < statuses.count(0) < 200
    for step, start in itertools.product((1, 3, -1), (0, 1, 2)):
        some = slice(start, None, step) if step > 0 else slice(None, None, -1)
        assert _cropped(payloads[some]) == (statuses[some], views[some])
    for n in range(0, 240, 5):
        assert _cropped(payloads[n : n + 1]) == (statuses[n : n + 1], views[n : n + 1])


# ------------------------------------------------------------------------------------------------------------
# Sets


def _source(folder: Path, damage: dict[int, str], count: int) -> FolderSource:
    folder.mkdir()
    for n in range(count):
        jpeg = encode(n, 40 + n % 5, 36 + n % 3, subsampling=n % 3)
        (folder / f"{n:03}.jpg").write_bytes(KINDS[damage[n]](jpeg) if n in damage else jpeg)
    return FolderSource(folder)


@given(damage=st.dictionaries(st.integers(0, 29), st.sampled_from(sorted(KINDS)), max_size=12))
@example(damage={0: "bits a sample"})
@example(damage=dict.fromkeys(range(0, 30, 3), "no Huffman tables"))
@settings(deadline=None, max_examples=12)
def test_converting_keeps_every_sound_image(
    tmp_path_factory: pytest.TempPathFactory, damage: dict[int, str]
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    source = _source(root / "pictures", damage, 30)
    sets = []
    for workers in (1, 2, 4):
        out = root / f"{workers}.beton"
        made = convert(source, out, workers=workers, max_bad=0.5)
        assert made.num_skipped == len(damage)
        assert [line.split(":")[0] for line in made.skipped] == [f"{n:03}.jpg" for n in sorted(damage)]
        sets.append((out.read_bytes(), skipped_path(out).read_bytes() if damage else b""))
    assert sets[0] == sets[1] == sets[2]
    shards = convert(source, root / "x.shards", workers=2, max_bad=0.5, sharding=Sharding(shard_size=7))
    assert (shards.manifest.count, shards.num_skipped) == (30 - len(damage), len(damage))


@pytest.fixture(scope="module")
def damaged_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A compiled set of 64 images with every kind of damage in it, and the positions of the damaged ones."""
    path = tmp_path_factory.mktemp("damaged_set") / "damaged_set.beton"
    bad = {7 * k + k % 3: kind for k, kind in enumerate([*KINDS, "bits a sample", "no Huffman tables"])}
    with BetonWriter(path, capacity=64) as writer:
        for n in range(64):
            jpeg = encode(n, 50 + n % 7, 44 + n % 4, subsampling=n % 3)
            size = {"width": 50 + n % 7, "height": 44 + n % 4}
            payload = KINDS[bad[n]](jpeg) if n in bad else jpeg
            writer.add(payload, label=0, source_path=f"{n}.jpg", **size)
        writer.commit(source="damaged_set")
    return path, sorted(bad)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_verify_names_exactly_the_damaged_images(damaged_set: tuple[Path, list[int]], workers: int) -> None:
    path, bad = damaged_set
    assert [picture.index for picture in verify(path, workers=workers).bad] == bad


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_views_do_not_depend_on_damaged_images(
    damaged_set: tuple[Path, list[int]], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bad = damaged_set
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    if backend == "dali":
        pytest.importorskip("nvidia.dali")

    def views(epoch: int, batch_size: int, num_threads: int) -> dict[int, bytes]:
        loader = build_loader(
            path, moco_v2(24), backend, batch_size=batch_size, num_threads=num_threads, drop_last=False
        )
        loader.set_epoch(epoch)
        found: dict[int, bytes] = {}
        for batch in loader:
            for index, query, key in zip(batch.index.tolist(), batch.query, batch.key, strict=True):
                found.setdefault(index, query.numpy().tobytes() + key.numpy().tobytes())
        # DALI does not notice damage inside the coded data.
        assert set(loader.faults) == set(bad) or (backend == "dali" and set(loader.faults) < set(bad))
        return found

    expected = views(1, 64, 1)
    for batch_size, num_threads in ((64, 2), (8, 1), (8, 4), (13, 2)):
        assert views(1, batch_size, num_threads) == expected


def test_a_folder_refuses_jpegs_without_a_table(tmp_path: Path) -> None:
    _source(tmp_path / "pictures", {3: "no Huffman tables", 9: "no quantisation tables"}, 16)
    loader = build_loader(tmp_path / "pictures", moco_v2(24), "folder", batch_size=16)
    list(loader)
    assert sorted(loader.faults) == [3, 9]


def test_other_formats_are_not_opened_whatever_their_name() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(UnidentifiedImageError):
        open_image(eps)
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # Pillow would open it
    assert read_rgb(eps) is None and read_size(eps) is None
