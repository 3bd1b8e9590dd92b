"""Opening a compiled set: what is refused, what is returned, and how much memory it needs."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.beton_writer import BetonWriter
from pipelines.sets import beton as layout
from pipelines.sets import manifest as module
from pipelines.sets.beton import (
    FIELD_DTYPE,
    HEADER_DTYPE,
    METADATA_DTYPE,
    MODE_JPEG,
    MODE_RAW,
    MODE_YUV420,
    TABLE_DTYPE,
    TIER_MODES,
    TYPE_IMAGE,
    TYPE_INT,
    TYPE_PLANES,
    BetonFile,
    open_beton,
    pixel_bytes,
)
from pipelines.sets.manifest import HASH_AT, TIERS, Tier

SIZES = ((1, 1), (5, 4), (4, 7), (3, 3))


def payload_of(tier: Tier, i: int) -> bytes:
    width, height = SIZES[i]
    size = 10 + i if tier == "jpeg" else pixel_bytes(TIER_MODES[tier], width, height)
    return bytes([i]) * size


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Tier], Path]:
    """A set of four images of a tier. Its JPEGs are not JPEGs, which opening does not check."""

    def write(tier: Tier) -> Path:
        path = tmp_path / f"{tier}.beton"
        with BetonWriter(path, capacity=len(SIZES), tier=tier, page_bytes=4096) as writer:
            for i, (width, height) in enumerate(SIZES):
                writer.add(payload_of(tier, i), label=i, width=width, height=height, source_path=str(i))
            writer.commit(source="test")
        return path

    return write


def parts(path: Path) -> tuple[np.memmap[Any, Any], Any, Any]:
    """Field descriptors, metadata and allocation table of a file, writable."""
    data = np.memmap(path, np.uint8, mode="r+")
    header = data[: HEADER_DTYPE.itemsize].view(HEADER_DTYPE)[0]
    fields_end = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize
    fields = data[HEADER_DTYPE.itemsize : fields_end].view(FIELD_DTYPE)
    records = data[fields_end : fields_end + int(header["num_samples"]) * METADATA_DTYPE.itemsize].view(
        METADATA_DTYPE
    )
    return fields, records, data[int(header["alloc_table_ptr"]) :].view(TABLE_DTYPE)


def refuse_to_sort(*_: Any, **__: Any) -> None:
    raise AssertionError("the index of our own writer needs no sorting")


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_opens_without_sorting(
    make: Callable[[Tier], Path], tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "argsort", refuse_to_sort)
    monkeypatch.setattr(np, "searchsorted", refuse_to_sort)
    beton = open_beton(make(tier))
    assert [beton.payload(i).tobytes() for i in range(4)] == [payload_of(tier, i) for i in range(4)]
    assert beton.metadata["f0"]["mode"].tolist() == [TIER_MODES[tier]] * 4
    for i in range(4):
        start, size = int(beton.pointers[i]), int(beton.sizes[i])
        assert beton.data[start : start + size].tobytes() == payload_of(tier, i)
    assert (beton.pointers.dtype, beton.sizes.dtype) == (np.uint64, np.uint64)
    assert np.shares_memory(beton.pointers, beton.data), "a view, not a copy"
    assert np.shares_memory(beton.sizes, beton.data), "a view, not a copy"


@given(order=st.permutations(range(4)), tier=st.sampled_from(TIERS))
def test_a_table_in_any_order_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], tier: Tier
) -> None:
    """FFCV's writer orders the table by the time at which its processes finished."""
    path = tmp_path_factory.mktemp("order") / "set.beton"
    with BetonWriter(path, capacity=4, tier=tier, page_bytes=4096) as writer:
        for i, (width, height) in enumerate(SIZES):
            writer.add(payload_of(tier, i), label=i, width=width, height=height, source_path=str(i))
        writer.commit(source="test")
    _, _, table = parts(path)
    table[:] = table[order].copy()
    beton = open_beton(path)
    assert [beton.payload(i).tobytes() for i in range(4)] == [payload_of(tier, i) for i in range(4)]


@pytest.mark.parametrize("sorted_table", [True, False])
def test_samples_may_share_a_payload(make: Callable[[Tier], Path], sorted_table: bool) -> None:
    path = make("jpeg")
    _, records, table = parts(path)
    records["f0"]["data_ptr"][2] = records["f0"]["data_ptr"][1]
    table["ptr"][2], table["size"][2] = table["ptr"][1], table["size"][1]
    if not sorted_table:
        table[:] = table[::-1].copy()
    beton = open_beton(path)
    assert beton.payload(2).tobytes() == beton.payload(1).tobytes() == payload_of("jpeg", 1)
    assert beton.payload(3).tobytes() == payload_of("jpeg", 3)


def shared_payload_set(path: Path, count: int) -> None:
    """A set of ``count`` samples, all equal to the first."""
    with BetonWriter(path, capacity=1, tier="raw") as writer:
        writer.add(bytes(12), label=0, width=2, height=2, source_path="0")
        writer.commit(source="test")
    data = path.read_bytes()
    header = np.frombuffer(data, HEADER_DTYPE, 1).copy()
    fields_end = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize
    record = np.frombuffer(data, METADATA_DTYPE, 1, fields_end)
    page = int(header["page_size"][0])
    metadata = np.repeat(record, count)
    payload_at = -(-(fields_end + metadata.nbytes) // page) * page
    metadata["f0"]["data_ptr"] = payload_at
    table = np.zeros(count, TABLE_DTYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), payload_at, 12
    header["num_samples"], header["alloc_table_ptr"] = count, payload_at + 12
    with path.open("wb") as file:
        file.write(header.tobytes() + data[HEADER_DTYPE.itemsize : fields_end] + metadata.tobytes())
        file.seek(payload_at)
        file.write(bytes(12) + table.tobytes())


def test_opening_needs_memory_for_a_block_not_for_the_index(tmp_path: Path) -> None:
    """A column of the index has 8 MB here, the whole index 48."""
    shared_payload_set(tmp_path / "set.beton", 1_000_000)
    open_beton(tmp_path / "set.beton")
    tracemalloc.start()
    try:
        beton = open_beton(tmp_path / "set.beton")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(beton) == 1_000_000
    assert kept < 1e5
    assert peak < 64 * module._BLOCK
    assert beton.payload(999_999).size == 12


@pytest.mark.parametrize("blocks", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("index", range(4))
def test_errors_name_the_right_image_in_any_block(
    make: Callable[[Tier], Path], monkeypatch: pytest.MonkeyPatch, blocks: int, index: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK", blocks)
    path = make("raw")
    _, records, table = parts(path)
    assert len(open_beton(path)) == 4
    table["size"][index] += 1
    with pytest.raises(ValueError, match=rf"image {index} of .* cannot have"):
        open_beton(path)
    table["size"][index] -= 1
    records["f0"]["data_ptr"][index] += 1 << 40
    with pytest.raises(ValueError, match=rf"image {index} at byte .* not in the allocation table"):
        open_beton(path)
    table["ptr"][index] += 1 << 40
    with pytest.raises(ValueError, match=rf"image {index} lies at bytes .* outside the payloads"):
        open_beton(path)


@pytest.mark.parametrize("width", [0, 1, 2, 4, 5])
def test_planes_of_another_size_are_refused(make: Callable[[Tier], Path], width: int) -> None:
    path = make("yuv420")
    _, records, _ = parts(path)
    records["f0"]["width"][3] = width
    with pytest.raises(ValueError, match=r"image 3 of .* mode 2, cannot have 17 bytes"):
        open_beton(path)


@pytest.mark.parametrize(
    ("tier", "other_type", "mode"),
    [("yuv420", TYPE_IMAGE, MODE_YUV420), ("jpeg", TYPE_PLANES, MODE_JPEG), ("raw", TYPE_PLANES, MODE_RAW)],
)
def test_a_mode_belongs_to_its_field_type(
    make: Callable[[Tier], Path], tier: Tier, other_type: int, mode: int
) -> None:
    path = make(tier)
    fields, _, _ = parts(path)
    assert fields["type_id"].tolist() == [TYPE_PLANES if tier == "yuv420" else TYPE_IMAGE, TYPE_INT]
    fields["type_id"][0] = other_type
    with pytest.raises(ValueError, match=rf"image 0 of 1 × 1 px, mode {mode}, cannot have"):
        open_beton(path)


@pytest.mark.parametrize("type_id", [0, 1, 3, 254])
def test_other_fields_are_refused(make: Callable[[Tier], Path], type_id: int) -> None:
    path = make("jpeg")
    fields, _, _ = parts(path)
    fields["type_id"][0] = type_id
    with pytest.raises(ValueError, match="has the fields"):
        open_beton(path)


@pytest.mark.needs("ffcv")
def test_the_layout_is_the_one_that_ffcv_has() -> None:
    from ffcv import types

    theirs = {
        HEADER_DTYPE: types.HeaderType,
        FIELD_DTYPE: types.FieldDescType,
        TABLE_DTYPE: types.ALLOC_TABLE_TYPE,
        METADATA_DTYPE: types.get_metadata_type([types.RGBImageField(), types.IntField()]),
    }
    for ours, their in theirs.items():
        assert (ours, ours.itemsize, ours.fields) == (their, their.itemsize, their.fields)  # fields: offsets
    assert METADATA_DTYPE["f0"].fields == theirs[METADATA_DTYPE]["f0"].fields
    assert types.CURRENT_VERSION == layout.VERSION
    assert types.TYPE_ID_HANDLER[TYPE_INT] is types.IntField
    assert types.TYPE_ID_HANDLER[TYPE_IMAGE] is types.RGBImageField
    assert types.TYPE_ID_HANDLER[TYPE_PLANES] is None


def test_offsets_in_the_layout() -> None:
    """The numbers of FFCV 1.0.2, for machines without it."""
    header = {"version": 0, "num_fields": 2, "page_size": 4, "num_samples": 8, "alloc_table_ptr": 16}
    image = {"mode": 0, "width": 1, "height": 3, "data_ptr": 5}
    expected: list[tuple[np.dtype[Any], int, dict[str, int]]] = [
        (HEADER_DTYPE, 24, header),
        (FIELD_DTYPE, 1041, {"type_id": 0, "name": 1, "arguments": 17}),
        (TABLE_DTYPE, 24, {"sample_id": 0, "ptr": 8, "size": 16}),
        (METADATA_DTYPE, 24, {"f0": 0, "f1": 16}),
        (METADATA_DTYPE["f0"], 13, image),
    ]
    for dtype, itemsize, offsets in expected:
        assert dtype.itemsize == itemsize
        assert dtype.fields is not None
        assert {name: field[1] for name, field in dtype.fields.items()} == offsets
    descriptors = np.zeros(2, FIELD_DTYPE)
    label_arguments = descriptors[1]["arguments"]
    assert HEADER_DTYPE.itemsize + label_arguments.ctypes.data - descriptors.ctypes.data == HASH_AT


@pytest.mark.needs("ffcv")
def test_stock_ffcv_refuses_planes(make: Callable[[Tier], Path]) -> None:
    """It would take them for pixels and read past every payload."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.reader import Reader

    path = make("yuv420")
    with pytest.raises(ValueError, match="custom field image"):
        Reader(str(path))
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    with pytest.raises(ValueError, match="custom field image"):
        Loader(str(path), batch_size=1, num_workers=1, pipelines=pipelines)
    for tier in ("jpeg", "raw"):
        assert int(Reader(str(make(tier))).num_samples) == 4


@given(width=st.integers(1, 70), height=st.integers(1, 70))
def test_pixel_bytes_counts_samples(width: int, height: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    chroma = len({(int(y), int(x)) for y, x in zip(rows.ravel() // 2, columns.ravel() // 2, strict=True)})
    assert pixel_bytes(MODE_YUV420, width, height) == width * height + 2 * chroma
    assert pixel_bytes(MODE_RAW, width, height) == 3 * width * height
    sides = np.array([width], np.uint64), np.array([height], np.uint64)
    assert pixel_bytes(MODE_YUV420, *sides).tolist() == [width * height + 2 * chroma]


def test_an_opened_set_has_no_writable_view(make: Callable[[Tier], Path]) -> None:
    beton: BetonFile = open_beton(make("jpeg"))
    for array in (beton.data, beton.pointers, beton.sizes, beton.labels):
        assert not array.flags.writeable
