import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset_tools.beton_writer import BetonWriter
from pipelines.sets.beton import open_beton
from pipelines.sets.manifest import Manifest, paths_path

PAGE = 4096


def write(
    path: Path, payloads: Sequence[bytes], labels: Sequence[int], *, capacity: int | None = None
) -> Manifest:
    with BetonWriter(path, capacity=capacity or len(payloads), page_bytes=PAGE) as writer:
        for i, (payload, label) in enumerate(zip(payloads, labels, strict=True)):
            assert (
                writer.add(payload, label=label, width=i % 9 + 1, height=i + 1, source_path=f"{i}.jpg") == i
            )
        return writer.commit(source="test")


def read_by_ffcv(path: Path, manager_name: str) -> list[bytes]:
    """All payloads in batches of two through a memory manager of stock FFCV, uncompiled to save time."""
    from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
    from ffcv.pipeline.compiler import Compiler
    from ffcv.reader import Reader

    reader = Reader(str(path))
    kind: Any = {"os": OSCacheManager, "process": ProcessCacheManager}[manager_name]
    manager = kind(reader)
    Compiler.set_enabled(False)
    try:
        read = manager.compile_reader()
    finally:
        Compiler.set_enabled(True)
    count = int(reader.num_samples)
    batches = [list(range(i, min(i + 2, count))) for i in range(0, count, 2)]
    context = manager.schedule_epoch(batches)
    found = []
    context.__enter__()
    try:
        for number, batch in enumerate(batches):
            context.start_batch(number)
            found += [bytes(read(reader.metadata["f0"]["data_ptr"][i], context.state)) for i in batch]
    finally:
        context.__exit__(None, None, None)
    return found


sizes = st.one_of(
    st.integers(1, 40),
    st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE]),
    st.integers(1, 5 * PAGE),
)
samples = st.lists(st.tuples(sizes, st.integers(-1, 2**62)), min_size=1, max_size=24)


@pytest.mark.needs("ffcv")
@given(samples=samples, spare=st.integers(0, 300), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("manager", ["os", "process"])
def test_ffcv_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    manager: str,
    samples: list[tuple[int, int]],
    spare: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    payloads = [rng.bytes(size) for size, _ in samples]
    labels = [label for _, label in samples]
    path = tmp_path_factory.mktemp("beton") / "set.beton"
    write(path, payloads, labels, capacity=len(samples) + spare)

    from ffcv.reader import Reader

    reader = Reader(str(path))
    assert reader.field_names == ["image", "label"]
    assert int(reader.num_samples) == len(samples)
    assert reader.metadata["f1"].tolist() == labels
    assert reader.metadata["f0"]["height"].tolist() == list(range(1, len(samples) + 1))
    table = reader.alloc_table
    page = int(reader.page_size)
    assert (table["ptr"] // page == (table["ptr"] + table["size"] - 1) // page).all(), (
        "a payload straddles a page"
    )
    assert read_by_ffcv(path, manager) == payloads

    ours = open_beton(path)
    assert [ours.payload(i).tobytes() for i in range(len(ours))] == payloads
    assert ours.labels.tolist() == labels


def test_page_grows_only_as_far_as_needed(tmp_path: Path) -> None:
    payloads = [b"a" * 4000, b"b" * 4000, b"c" * 9000, b"d"]
    write(tmp_path / "set.beton", payloads, [0, 1, 2, 3])
    beton = open_beton(tmp_path / "set.beton")
    assert beton.page_bytes == 16384
    assert [beton.payload(i).tobytes() for i in range(4)] == payloads


@pytest.mark.needs("ffcv")
def test_ffcv_reads_a_file_with_a_grown_page(tmp_path: Path) -> None:
    payloads = [b"a" * 4000, b"b" * 4000, b"c" * 9000, b"d"]
    write(tmp_path / "set.beton", payloads, [0, 1, 2, 3])
    assert read_by_ffcv(tmp_path / "set.beton", "process") == payloads


@pytest.mark.needs("ffcv")
def test_same_layout_as_the_stock_writer(tmp_path: Path) -> None:
    """For the same raw images, only offsets and our hash differ from ffcv.DatasetWriter's file."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), label) for label in (3, -1, 2)]
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(tmp_path / "stock.beton"), fields, num_workers=1).from_indexed_dataset(images)
    with BetonWriter(tmp_path / "ours.beton", capacity=3, tier="raw") as writer:
        for pixels, label in images:
            writer.add(pixels, label=label, width=7, height=5, source_path="x")
        writer.commit(source="test")

    stock, ours = Reader(str(tmp_path / "stock.beton")), Reader(str(tmp_path / "ours.beton"))
    descriptors = ours.field_descriptors.copy()
    sha256 = open_beton(tmp_path / "ours.beton").sha256
    assert bytes(descriptors[1]["arguments"][:64]).decode() == sha256 != ""
    descriptors[1]["arguments"][:64] = 0
    assert stock.field_descriptors.tobytes() == descriptors.tobytes()
    assert open_beton(tmp_path / "stock.beton").sha256 == ""
    for name in ("version", "num_fields", "page_size", "num_samples"):
        assert stock.header[name] == ours.header[name], name
    assert stock.metadata.dtype == ours.metadata.dtype
    for column in ("mode", "width", "height"):
        assert stock.metadata["f0"][column].tolist() == ours.metadata["f0"][column].tolist(), column
    assert stock.metadata["f1"].tolist() == ours.metadata["f1"].tolist()
    assert stock.alloc_table["size"].tolist() == ours.alloc_table["size"].tolist()
    theirs = open_beton(tmp_path / "stock.beton")
    assert [theirs.payload(i).tobytes() for i in range(3)] == [pixels.tobytes() for pixels, _ in images]


def test_manifest_and_paths_are_written_next_to_the_file(tmp_path: Path) -> None:
    manifest = write(tmp_path / "set.beton", [b"one", b"two"], [0, 1])
    assert manifest == Manifest.read(tmp_path / "set.beton")
    assert (manifest.count, manifest.num_bytes) == (2, (tmp_path / "set.beton").stat().st_size)
    assert paths_path(tmp_path / "set.beton").read_text() == "0.jpg\n1.jpg\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.beton", "set.json", "set.paths"]


def test_hash_depends_on_payloads_order_and_labels(tmp_path: Path) -> None:
    variants = [([b"one", b"two"], [0, 1]), ([b"two", b"one"], [0, 1]), ([b"one", b"two"], [1, 0])]
    hashes = {write(tmp_path / f"{i}.beton", *variant).sha256 for i, variant in enumerate(variants)}
    assert len(hashes) == 3
    assert write(tmp_path / "again.beton", *variants[0], capacity=500).sha256 in hashes, (
        "offsets are not hashed"
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BetonWriter(tmp_path / "set.beton", capacity=2) as writer:
        writer.add(b"one", label=0, width=1, height=1, source_path="1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "set.beton", capacity=2) as writer:
        writer.add(b"one", label=0, width=1, height=1, source_path="1")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Closing flushes the buffer and fails once more; the file must be removed all the same."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = BetonWriter(tmp_path / "set.beton", capacity=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"), writer:
            writer.add(bytes(3 << 20), label=0, width=1, height=1, source_path="1")
            writer.commit(source="test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_disk_while_images_are_added_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports it only once, in the first sync after it; the final sync would succeed."""
    from dataset_tools import disk

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "_SYNC_EVERY_BYTES", 100)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    write(tmp_path / "set.beton", [b"x" * 60] * 20, [0] * 20)
    assert 1 <= len(synced) <= 10
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "bad.beton", [b"x" * 60] * 2, [0] * 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.beton", "set.json", "set.paths"]


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "set.beton", capacity=1) as first:
        with pytest.raises(FileExistsError, match="another process"):
            BetonWriter(tmp_path / "set.beton", capacity=1)
        first.add(b"one", label=0, width=1, height=1, source_path="1")
        first.commit(source="test")
        with BetonWriter(tmp_path / "set.beton", capacity=1, overwrite=True) as second:
            first.discard()
            second.add(b"two", label=0, width=1, height=1, source_path="2")
            assert (tmp_path / "set.beton.partial").exists(), "the first does not remove the second's file"
    assert open_beton(tmp_path / "set.beton").payload(0).tobytes() == b"one"


def _add(**changes: Any) -> Callable[[BetonWriter], object]:
    arguments: dict[str, Any] = {
        "payload": b"x",
        "label": 0,
        "width": 1,
        "height": 1,
        "source_path": "big.jpg",
    } | changes
    return lambda writer: writer.add(arguments.pop("payload"), **arguments)


@pytest.mark.parametrize(
    ("options", "act", "words"),
    [
        ({"capacity": 0}, None, "capacity is 0"),
        ({"tier": "gif"}, None, "tier is 'gif'"),
        ({"page_bytes": 5000}, None, "page_bytes is 5000"),
        ({"page_bytes": 1 << 32}, None, "page_bytes is 4294967296"),
        ({}, _add(width=65_536), "65536 × 1 px"),
        ({}, _add(height=0), "1 × 0 px"),
        ({}, _add(payload=b""), "payload of 0 bytes"),
        ({"tier": "raw"}, _add(payload=b"xx"), "raw payload of 2 bytes"),
        ({"tier": "yuv420"}, _add(payload=b"xx"), "yuv420 payload of 2 bytes"),
        ({"tier": "yuv420"}, _add(payload=b"xxx", width=2), "yuv420 payload of 3 bytes for 2 × 1 px"),
        ({}, lambda writer: writer.commit(source="test"), "there is no image to write to"),
    ],
)
def test_misuse_is_an_error(tmp_path: Path, options: dict[str, Any], act: Any, words: str) -> None:
    def attempt() -> None:
        with BetonWriter(tmp_path / "set.beton", **({"capacity": 1} | options)) as writer:
            act(writer)

    with pytest.raises(ValueError, match=words):
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_adding_to_a_full_set_is_an_error(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "set.beton", capacity=1) as writer:
        writer.add(b"x", label=0, width=1, height=1, source_path="1")
        with pytest.raises(ValueError, match="is full"):
            writer.add(b"x", label=0, width=1, height=1, source_path="2")


def test_name_and_folder_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not end in \.beton"):
        BetonWriter(tmp_path / "set.bin", capacity=1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        BetonWriter(tmp_path / "no" / "set.beton", capacity=1)
