"""The loader: what views depend on, sharding, resuming, bad images; the backends compared with folder."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.beton_writer import BetonWriter
from pipelines import Batch, ViewLoader, build_loader, evaluation_batches
from pipelines.recipe import Mixing, Recipe, evaluation, moco_v2
from pipelines.sets.beton import open_beton
from pipelines.workers import BadImagesError

NEEDS_DALI = pytest.mark.needs("nvidia.dali")
DALI = pytest.param("dali", marks=NEEDS_DALI)
RECIPE = moco_v2(48, Mixing(method="both", grid_size=4))


def _load(path: Path, **options: object) -> ViewLoader:
    return build_loader(path, RECIPE, **{"batch_size": 8, "seed": 3, **options})


def _views(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """index → its two views."""
    return {
        int(i): torch.stack([q, k]) for b in batches for i, q, k in zip(b.index, b.query, b.key, strict=True)
    }


def _same(first: Batch, second: Batch) -> bool:
    mixed = zip(first.mixtures, second.mixtures, strict=True)
    return (
        torch.equal(first.query, second.query)
        and torch.equal(first.key, second.key)
        and torch.equal(first.index, second.index)
        and torch.equal(first.label, second.label)
        and all(torch.equal(a.images, b.images) and torch.equal(a.lam, b.lam) for a, b in mixed)
    )


def test_batches_follow_the_contract(beton: Path) -> None:
    loader = _load(beton)
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    for batch in batches:
        assert batch.query.shape == batch.key.shape == (8, 3, 48, 48)
        assert batch.query.dtype == torch.float32
        assert batch.query.is_contiguous(memory_format=torch.channels_last)
        assert batch.index.dtype == batch.label.dtype == torch.int64
        assert len(batch.mixtures) == 2
        assert (batch.label == (batch.index >= 20).long()).all()
    assert sorted(int(i) for b in batches for i in b.index) == list(range(40))
    assert loader.set.classes == ("bird", "cat")


def test_a_symmetric_recipe_mixes_both_views_alike(beton: Path) -> None:
    symmetric = dataclasses.replace(RECIPE, mixing=dataclasses.replace(RECIPE.mixing, symmetric=True))
    loader = build_loader(beton, symmetric, batch_size=8, seed=3)
    for one_way, both in zip(_load(beton), loader, strict=True):
        assert _same(one_way, both) and one_way.key_mixtures == () and len(both.key_mixtures) == 2
        for mixture, of_keys in zip(both.mixtures, both.key_mixtures, strict=True):
            assert torch.equal(mixture.partner, of_keys.partner) and torch.equal(mixture.lam, of_keys.lam)
            # Each pixel of a mixture lies between the two pixels it is made of.
            pair = torch.stack([both.key, both.key[of_keys.partner]])
            assert (of_keys.images <= pair.amax(0) + 1e-5).all()
            assert (of_keys.images >= pair.amin(0) - 1e-5).all()


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than cores are an error, and a machine may have one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("backend", ["ffcv", DALI, "folder"])
def test_views_do_not_depend_on_threads(backend: str, beton: Path, picture_folder: Path) -> None:
    path = picture_folder if backend == "folder" else beton
    one, two = (list(_load(path, backend=backend, num_threads=n)) for n in (1, 2))
    assert all(_same(a, b) for a, b in zip(one, two, strict=True))


def test_views_do_not_depend_on_batch_size(beton: Path) -> None:
    small, large = (_views(list(_load(beton, batch_size=n))) for n in (4, 20))
    assert small.keys() == large.keys()
    assert all(torch.equal(small[i], large[i]) for i in small)


def test_epochs_differ_and_repeat(beton: Path) -> None:
    loader = _load(beton)
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    loader.set_epoch(0)
    assert all(_same(a, b) for a, b in zip(first, loader, strict=True))
    one, two = _views(first), _views(second)
    assert not any(torch.equal(one[i], two[i]) for i in one)


def test_ranks_share_the_epoch_without_overlap(beton: Path) -> None:
    """In each step, two ranks with half the batch have the images of one process with the whole batch."""
    alone = list(_load(beton, batch_size=8))
    ranks = [list(_load(beton, batch_size=4, rank=r, world_size=2)) for r in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
        assert torch.equal(whole.query, torch.cat([part.query for part in parts]))


@pytest.mark.usefixtures("four_cores")
def test_resumed_in_the_middle_gives_the_rest(beton: Path) -> None:
    whole = _load(beton)
    whole.set_epoch(2)
    expected = list(whole)
    stopped = _load(beton, num_threads=1)
    stopped.set_epoch(2)
    batches = iter(stopped)
    for _ in range(2):
        next(batches)
    state = stopped.state_dict()
    batches.close()  # type: ignore[attr-defined]

    resumed = _load(beton, num_threads=2)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == 3
    assert all(_same(a, b) for a, b in zip(expected[2:], rest, strict=True))
    resumed.set_epoch(3)
    assert len(list(resumed)) == 5


def test_state_after_the_last_batch_resumes_with_nothing_left(beton: Path) -> None:
    loader = _load(beton)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed = _load(beton)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    assert len(list(resumed)) == 5


def test_state_of_another_run_is_refused(beton: Path, picture_folder: Path) -> None:
    state = _load(beton).state_dict()
    with pytest.raises(ValueError, match="seed"):
        _load(beton, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="global_batch"):
        _load(beton, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle"):
        _load(beton, shuffle=False).load_state_dict(state)
    with pytest.raises(ValueError, match="set"):
        _load(picture_folder).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has version 1, this loader has 3: .* start a new run"):
        _load(beton).load_state_dict({**state, "version": 1})
    for done in (-1, 6):
        with pytest.raises(ValueError, match=f"done {done} of 5 batches"):
            _load(beton).load_state_dict({**state, "batches_done": done})


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(beton: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 2\^64\)"):
        _load(beton, seed=seed)
    assert len(list(_load(beton, seed=2**64 - 1))) == 5


def test_epochs_out_of_range_are_refused(beton: Path) -> None:
    with pytest.raises(ValueError, match="epoch is -1"):
        _load(beton).set_epoch(-1)


def test_a_new_iteration_ends_the_one_before_and_owns_the_cursor(beton: Path) -> None:
    loader = _load(beton)
    old = iter(loader)
    next(old)
    loader.set_epoch(1)
    new = iter(loader)
    next(new)
    next(new)
    with pytest.raises(RuntimeError, match="epoch 0 was being iterated"):
        next(old)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches_done"]) == (1, 2)
    assert len(list(new)) == 3
    assert loader.state_dict()["batches_done"] == 0


def test_a_batch_that_fails_does_not_move_the_cursor(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = _load(beton)

    def fail(*_: object) -> None:
        raise MemoryError("no memory for the mixture")

    monkeypatch.setattr("pipelines.loader.draw_mixtures", fail)
    with pytest.raises(MemoryError):
        next(iter(loader))
    assert loader.state_dict()["batches_done"] == 0


@pytest.mark.parametrize("backend", ["ffcv", DALI])
def test_backends_equal_folder_on_the_same_boxes(backend: str, beton: Path, picture_folder: Path) -> None:
    compiled, files = _load(beton, backend=backend), _load(picture_folder)
    assert (compiled.decoder.name, files.decoder.name) == (backend, "folder")
    index = np.arange(40)
    encoded, read = compiled.set.fetch(index), files.set.fetch(index)
    assert np.array_equal(encoded.size_N2, read.size_N2)
    assert np.array_equal(compiled.set.labels(index), files.set.labels(index))
    boxes = _load(beton).boxes(5, index)
    got, expected = (np.zeros((40, 2, 48, 48, 3), np.uint8) for _ in range(2))
    assert compiled.decoder.crop(encoded, boxes, got).all()
    assert files.decoder.crop(read, boxes, expected).all()
    off = np.abs(got.astype(int) - expected)
    if backend == "dali":  # its pixels are those of PIL
        assert off.max() <= 1
    # Colours that RGB cannot show are clamped before PIL resamples and after the planes are resampled.
    assert (off > 2).mean() < 1e-3 and off.mean() < 0.5
    assert expected.std() > 20


@pytest.mark.parametrize("backend", ["ffcv", DALI])
def test_backends_equal_folder_on_whole_batches(backend: str, beton: Path, picture_folder: Path) -> None:
    one_level = 1 / 255 / min(RECIPE.std)
    for a, b in zip(_load(beton, backend=backend), _load(picture_folder), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.label, b.label)
        # Jitter may enlarge the two grey levels in which nearly all pixels agree.
        off = (a.query - b.query).abs()
        assert (off > 8 * one_level).float().mean() < 1e-3
        assert off.mean() < 0.5 * one_level


def test_reading_ahead_gives_the_same_batches_as_mapping(beton: Path) -> None:
    mapped, read = (list(_load(beton, reading=reading)) for reading in ("map", "read"))
    assert all(_same(a, b) for a, b in zip(mapped, read, strict=True))


def test_a_file_that_becomes_unreadable_is_an_error(beton: Path, tmp_path: Path) -> None:
    loader = _load(beton, reading="read")
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as empty:
        os.dup2(empty.fileno(), loader.set._file)
    with pytest.raises(OSError, match=r"pictures\.beton was cut short while it was read: image \d+"):
        list(loader)


@pytest.mark.parametrize("backend", ["ffcv", DALI, "folder"])
def test_crops_are_the_views_before_the_photometric_stage(
    backend: str, beton: Path, picture_folder: Path
) -> None:
    path = picture_folder if backend == "folder" else beton
    plain = Recipe(crop_px=32, jitter_prob=0, grey_prob=0, blur_prob=0, mean=(0, 0, 0), std=(1, 1, 1))
    loader = build_loader(path, plain, backend, batch_size=8, seed=3)  # type: ignore[arg-type]
    crops, batches = list(loader.crops()), list(loader)
    assert len(crops) == len(batches) == 5
    for crop, batch in zip(crops, batches, strict=True):
        assert crop.views.shape == (8, 2, 32, 32, 3) and crop.views.dtype == torch.uint8
        assert torch.equal(crop.index, batch.index) and torch.equal(crop.label, batch.label)
        for view, images in enumerate((batch.query, batch.key)):
            expected = crop.views[:, view].permute(0, 3, 1, 2).float() / 255
            assert (images - expected).abs().max() < 1e-6


def test_batches_do_not_change_while_they_are_held(beton: Path) -> None:
    """The memory of a batch is reused only after its last view is deleted."""
    held, copies = [], []
    for epoch in range(4):
        loader = _load(beton)
        loader.set_epoch(epoch)
        for batch in loader:
            held.append(batch.query[3:5])
            copies.append(batch.query[3:5].clone())
    assert all(torch.equal(view, copy) for view, copy in zip(held, copies, strict=True))


def test_one_view_for_evaluation(beton: Path) -> None:
    view = evaluation(RECIPE)
    batches = list(evaluation_batches(beton, view, batch_size=16))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 20 + [1] * 20
    limited = list(evaluation_batches(beton, view, batch_size=16, limit=20))
    assert sum(len(labels) for _, labels in limited) == 20
    again = list(evaluation_batches(beton, view, batch_size=7))
    images, others = (torch.cat([images for images, _ in b]) for b in (batches, again))
    assert torch.allclose(images, others)


def test_an_image_of_one_pixel_gives_flat_views(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (1, 1), (200, 30, 60)).save(tmp_path / f"{i}.png")
    plain = Recipe(crop_px=16, jitter_prob=0, grey_prob=0, blur_prob=0, mean=(0, 0, 0), std=(1, 1, 1))
    batch = next(iter(build_loader(tmp_path, plain, batch_size=2)))
    expected = torch.tensor([200, 30, 60]).view(1, 3, 1, 1) / 255
    assert (batch.query - expected).abs().max() < 1e-6


@pytest.fixture
def damaged_folder(picture_folder: Path, tmp_path: Path) -> Path:
    """Forty files, of which three cannot be decoded: one cut short, one not an image, the last one empty."""
    root = tmp_path / "damaged"
    shutil.copytree(picture_folder, root)
    cut = root / "bird" / "03.JPEG"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (root / "cat" / "00.JPEG").write_bytes(b"not a picture")
    (root / "cat" / "19.JPEG").write_bytes(b"")
    return root


def test_bad_images_are_replaced_counted_and_named(
    damaged_folder: Path, picture_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = _load(damaged_folder)
    views = list(loader)
    faults = {fault.index: (fault.name, fault.replaced_by) for fault in loader.faults.values()}
    assert faults == {3: ("bird/03.JPEG", 4), 20: ("cat/00.JPEG", 21), 39: ("cat/19.JPEG", 0)}
    assert "bird/03.JPEG" in caplog.text
    indices = sorted(int(i) for b in views for i in b.index)
    assert len(indices) == 40 and not {3, 20, 39} & set(indices)
    # A replacement is the neighbour's own view, with its label.
    sound = _views(list(_load(picture_folder)))
    for i, view in _views(views).items():
        assert torch.equal(view, sound[i])


@pytest.mark.parametrize(
    ("backend", "where"),
    [
        ("ffcv", "header"),
        ("ffcv", "second half"),
        ("ffcv", "middle of the scan"),
        # In the middle of the scan DALI, like PIL, returns pixels.
        pytest.param("dali", "header", marks=NEEDS_DALI),
        pytest.param("dali", "second half", marks=NEEDS_DALI),
    ],
)
def test_damage_inside_a_compiled_set_is_replaced_too(
    backend: str, where: str, beton: Path, tmp_path: Path
) -> None:
    """In the middle of the scan PIL returns pixels and no error."""
    copy = tmp_path / "damaged.beton"
    for file in beton.parent.glob("pictures.*"):
        shutil.copy(file, copy.with_suffix(file.suffix))
    opened = open_beton(copy)
    start, half = int(opened.metadata["f0"]["data_ptr"][7]), int(opened.sizes[7]) // 2
    damage = {
        "header": bytes(200),
        "second half": bytes(half),
        "middle of the scan": b"\xff\xd9" + bytes(200),
    }
    with copy.open("r+b") as file:
        file.seek(start if where == "header" else start + half)
        file.write(damage[where])
    loader = _load(copy, backend=backend)
    batches = list(loader)
    assert {i: fault.replaced_by for i, fault in loader.faults.items()} == {7: 8}
    assert loader.faults[7].name == "bird/07.JPEG"
    sound = _views(list(_load(beton, backend=backend)))
    assert all(torch.equal(v, sound[i]) for i, v in _views(batches).items())


def test_raw_images_must_have_their_size(tmp_path: Path) -> None:
    path = tmp_path / "raw.beton"
    with BetonWriter(path, capacity=2, tier="raw") as writer:
        for value in range(2):
            writer.add(bytes([value]) * 60, label=0, width=5, height=4, source_path="x")
        writer.commit(source="test", classes=("one",), replaced={}, settings={})
    record = open_beton(path).metadata[1:].copy()
    sound = record.tobytes()
    record["f0"]["width"] = 6
    path.write_bytes(path.read_bytes().replace(sound, record.tobytes()))
    with pytest.raises(ValueError, match=r"image 1 of 6 × 4 px, mode 1, cannot have 60 bytes"):
        _load(path, batch_size=2)


def test_too_many_bad_images_stop_the_run(picture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    shutil.copytree(picture_folder, root)
    for i in range(0, 20):
        (root / "bird" / f"{i:02}.JPEG").write_bytes(b"broken")
    with pytest.raises(BadImagesError, match=r"images .*cannot be decoded"):
        list(_load(root))


def test_stopping_early_leaves_no_thread_behind(beton: Path) -> None:
    import threading

    for _ in range(3):
        batches = iter(_load(beton))
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("view-")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, "larger than the set of 40"),
        ({"batch_size": 21, "world_size": 2}, "at most 20"),
        ({"batch_size": 0}, "at least 1"),
        ({"drop_last": False}, "without mixing"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"num_threads": 4096}, "4096 threads"),
        ({"backend": "folder"}, "is a compiled set"),
        ({"backend": "webdataset"}, "known are"),
        ({"reading": "slowly"}, "known are auto, map, read, stream"),
        ({"reading": "stream"}, "takes a folder of shards"),
    ],
)
def test_wrong_options_are_refused(beton: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(beton, **options)


def test_a_folder_has_one_reading(picture_folder: Path) -> None:
    with pytest.raises(ValueError, match="folder of images, which are always read ahead"):
        _load(picture_folder, reading="map")


def test_a_file_deleted_after_opening_is_replaced_and_named(picture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "gone"
    shutil.copytree(picture_folder, root)
    loader = _load(root)
    (root / "bird" / "05.JPEG").unlink()
    assert len(list(loader)) == 5
    assert {i: fault.name for i, fault in loader.faults.items()} == {5: "bird/05.JPEG"}


def test_wrong_paths_are_refused(beton: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make convert"):
        _load(tmp_path / "absent.beton")
    with pytest.raises(ValueError, match="does not exist"):
        _load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        _load(tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match="no images"):
        _load(tmp_path / "notes")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_beton_cut_short_is_refused(beton: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.beton"
    content = beton.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.beton.* cut short; convert it again"):
        _load(cut)


def test_a_beton_that_does_not_fit_its_manifest_is_refused(beton: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.beton"
    shutil.copy(beton, copy)
    shutil.copy(beton.with_suffix(".json"), copy.with_suffix(".json"))
    with copy.open("ab") as file:
        file.write(bytes(24))
    with pytest.raises(ValueError, match="manifest"):
        _load(copy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["mixmask", "unmix", "both", "erase"])
def test_batches_on_a_gpu_equal_the_cpus_without_a_host_sync(method: str, beton: Path) -> None:
    recipe = moco_v2(48, Mixing(method=method, grid_size=4))
    options = {"batch_size": 8, "seed": 3}
    expected = list(build_loader(beton, recipe, **options))
    batches = iter(build_loader(beton, recipe, device="cuda", **options))
    got = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for gpu, cpu in zip(got, expected, strict=True):
        assert (gpu.query.cpu() - cpu.query).abs().max() < 1e-2
        for on_gpu, on_cpu in zip(gpu.mixtures, cpu.mixtures, strict=True):
            assert torch.equal(on_gpu.partner.cpu(), on_cpu.partner)
            assert torch.allclose(on_gpu.lam.cpu(), on_cpu.lam)
