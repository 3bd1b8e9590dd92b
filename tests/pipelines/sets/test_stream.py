"""DALI's reader of shards: the promises of its stream, resuming, and errors for files that do not fit."""

import itertools
import os
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataset_tools.index_shards import index_shards
from pipelines import Backend, Batch, Recipe, ViewLoader, build_loader
from pipelines.recipe import Mixing
from pipelines.sets.shards import open_shards

pytestmark = pytest.mark.needs("nvidia.dali")
RECIPE = Recipe(crop_px=32, mixing=Mixing(method="mixmask"))


def _stream(path: Path, backend: Backend = "dali", **options: object) -> ViewLoader:
    return build_loader(path, RECIPE, backend, **{"batch_size": 6, "seed": 3, "reading": "stream"} | options)  # type: ignore[arg-type]


def _indices(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.index]


def test_every_image_comes_once_with_the_views_of_any_other_reading(shards: Path) -> None:
    batches = list(_stream(shards))
    indices = _indices(batches)
    assert len(indices) == len(set(indices)) == 36
    assert indices != sorted(indices)
    others = build_loader(shards, RECIPE, "dali", batch_size=8, seed=3)
    views = {int(i): view for b in others for i, view in zip(b.index, b.query, strict=True)}
    labels = {int(i): int(label) for b in others for i, label in zip(b.index, b.label, strict=True)}
    for batch in batches:
        for i, view, label in zip(batch.index, batch.query, batch.label, strict=True):
            assert torch.equal(view, views[int(i)]) and int(label) == labels[int(i)]


def test_the_decoder_does_not_change_the_order(shards: Path) -> None:
    assert _indices(list(_stream(shards))) == _indices(list(_stream(shards, "ffcv")))


def test_epochs_and_seeds_differ_and_repeat(shards: Path) -> None:
    first, second = _stream(shards), _stream(shards)
    second.set_epoch(1)
    orders = [_indices(list(loader)) for loader in (first, second, _stream(shards, seed=4), _stream(shards))]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resumed_at_any_batch_gives_the_rest(stop: int, shards: Path) -> None:
    whole = list(_stream(shards))
    loader = _stream(shards)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    batches.close()  # type: ignore[attr-defined]
    resumed = _stream(shards)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == 6 - stop
    for batch, expected in zip(rest, whole[stop:], strict=True):
        assert torch.equal(batch.index, expected.index)
        assert torch.equal(batch.mixtures[0].images, expected.mixtures[0].images)
    # The next epoch begins at its start.
    resumed.set_epoch(1)
    loader.set_epoch(1)
    assert _indices(list(resumed)) == _indices(list(loader))


def test_ranks_share_the_set_and_the_state_of_one_resumes_all(shards: Path) -> None:
    loaders = [_stream(shards, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    begun = [iter(loader) for loader in loaders]
    for batches in begun:
        next(batches)
    states = [loader.state_dict() for loader in loaders]
    assert states[0] == states[1]
    rest = [_indices(list(batches)) for batches in begun]
    resumed = _stream(shards, batch_size=4, rank=1, world_size=2)
    resumed.load_state_dict(states[0])
    assert _indices(list(resumed)) == rest[1]
    assert not set(rest[0]) & set(rest[1])


def test_a_state_of_another_order_is_refused(shards: Path) -> None:
    own = build_loader(shards, RECIPE, "dali", batch_size=6, seed=3)
    with pytest.raises(
        ValueError, match=r"stream none, this run has 1 ranks, .*resume with the same .* reading"
    ):
        _stream(shards).load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="backend dali, this run has ffcv"):
        _stream(shards, "ffcv").load_state_dict(_stream(shards).state_dict())


def test_a_state_that_does_not_fit_the_stream_is_refused(shards: Path) -> None:
    state = _stream(shards, batch_size=4).state_dict() | {"batches_done": 1}
    with pytest.raises(ValueError, match="done 1 batches of a stream but lacks its checkpoint"):
        _stream(shards, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="taken with stream 1 ranks"):
        _stream(shards, batch_size=2, world_size=2).load_state_dict(state)
    loader = _stream(shards, batch_size=4)
    loader.load_state_dict(state | {"stream_state": "AAAA"})
    with pytest.raises(ValueError, match="the state's checkpoint 'AAAA' is not of this set"):
        list(loader)


def test_the_epoch_after_a_complete_one_begins_at_its_start(shards: Path) -> None:
    loader = _stream(shards)
    list(loader)
    assert loader.state_dict()["stream_state"] == ""
    loader.set_epoch(1)
    fresh = _stream(shards)
    fresh.set_epoch(1)
    assert _indices(list(loader)) == _indices(list(fresh))


def test_images_are_shuffled_across_shards(shards: Path) -> None:
    loader = _stream(shards)
    index = loader.set.shard_set.index  # type: ignore[attr-defined]
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([int(index[i]["shard"]) for i in _indices(list(loader))])
    # With all shards in the buffer, neighbours come from different shards, and not in the order of these.
    for order in orders:
        assert sum(a != b for a, b in itertools.pairwise(order)) > 18
    assert orders[0] != orders[1]


@pytest.mark.parametrize("suffix", ["JPG", "left.jpg"])
def test_foreign_shards_and_foreign_names(suffix: str, tmp_path: Path, picture_folder: Path) -> None:
    """Colons and spaces in names, a relative path, upper case, an unusual extension."""
    folder = tmp_path / "a:7:b"
    folder.mkdir()
    pictures = sorted(picture_folder.rglob("*.JPEG"))[:9]
    for number, name in enumerate(("sh:12:ard.tar", "second.tar")):
        with tarfile.open(folder / name, "w") as tar:
            for k, picture in enumerate(pictures[4 * number : 4 * number + 4]):
                tar.add(picture, f"dir/pic:{k}.{suffix}")
    index_shards(folder, extensions=[suffix])
    whole = build_loader(folder, RECIPE, "dali", batch_size=4)
    views = {int(i): view for b in whole for i, view in zip(b.index, b.query, strict=True)}
    streamed = build_loader(os.path.relpath(folder), RECIPE, "dali", batch_size=4, reading="stream")
    batches = list(streamed)
    assert sorted(_indices(batches)) == list(range(8))
    for batch in batches:
        assert all(torch.equal(v, views[int(i)]) for i, v in zip(batch.index, batch.query, strict=True))


def test_more_shards_than_open_files_are_refused_with_advice(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: requested.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 4096))
    _stream(shards)
    assert requested == [(518, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    with pytest.raises(ValueError, match=r"keeps all 6 shards open, .* may have 200 .*ulimit -n 518"):
        _stream(shards)


def test_few_tars_stay_open_and_the_others_are_closed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(build_loader(shards, RECIPE, "dali", batch_size=8))
    monkeypatch.setattr("pipelines.sets.stores._MAX_OPEN_FILES", 2)
    loader = build_loader(shards, RECIPE, "dali", batch_size=8)
    before = len(list(Path("/proc/self/fd").iterdir()))
    batches = list(loader)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert all(torch.equal(a.query, b.query) for a, b in zip(whole, batches, strict=True))


def test_in_order_without_shuffling(shards: Path) -> None:
    index = open_shards(shards).index
    indices = _indices(list(_stream(shards, shuffle=False)))
    places = [(int(index[i]["shard"]), int(index[i]["offset"])) for i in indices]
    assert places == sorted(places)


def _drop_index(copy: Path) -> None:
    (copy / "000002.idx").unlink()


def _swap_indices(copy: Path) -> None:
    shutil.copy(copy / "000001.idx", copy / "000000.idx")


def _shift_index(copy: Path) -> None:
    file = copy / "000000.idx"
    file.write_text(file.read_text().replace("jpg 512 ", "jpg 1024 "))


def _shorten_index(copy: Path) -> None:
    lines = (copy / "000003.idx").read_text().splitlines()
    (copy / "000003.idx").write_text("\n".join(["v1.2 6", *lines[1:-1]]) + "\n")


def _lengthen_picture(copy: Path) -> None:
    file = copy / "000000.idx"
    first = file.read_text().splitlines()[1].split()
    file.write_text(file.read_text().replace(f"jpg 512 {first[2]} ", f"jpg 512 {int(first[2]) + 1} "))


def _spoil_index(copy: Path) -> None:
    (copy / "000003.idx").write_text("what is this")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_index, r"000002\.idx is missing, which DALI's reader needs; index the shards"),
        (_swap_indices, "does not match the index of .* file does not fit its tar"),
        (_shift_index, "does not match the index of .* file does not fit its tar"),
        (_lengthen_picture, "does not match the index of .* file does not fit its tar"),
        (_shorten_index, r"list 39 images, its manifest 40"),
        (_spoil_index, "DALI cannot open the shards"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    damage: Callable[[Path], None], message: str, shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(_stream(copy))


@pytest.mark.parametrize("reading", ["read", "stream"])
def test_a_tar_cut_short_during_the_run_is_named(reading: str, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    loader = _stream(copy, reading=reading)
    tar = copy / "000004.tar"
    with tar.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match=r"000004\.tar"):
        list(loader)


@pytest.mark.needs()  # nothing
@pytest.mark.parametrize("reading", ["auto", "stream"])
def test_a_tar_cut_short_or_missing_is_refused(reading: str, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    tar = copy / "000004.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"000004\.tar has 2000 bytes, the manifest says"):
        _stream(copy, reading=reading)
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"000004\.tar is missing"):
        _stream(copy, reading=reading)


def test_a_damaged_image_in_a_shard_is_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    opened = open_shards(copy)
    record = opened.index[11]
    with opened.tar_path(int(record["shard"])).open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(bytes(300))
    for reading in ("read", "stream"):
        loader = _stream(copy, reading=reading, batch_size=8)
        assert len(list(loader)) == 5
        assert {i: fault.replaced_by for i, fault in loader.faults.items()} == {11: 12}
        assert "bird/11.jpg in 0000" in loader.faults[11].name


def test_options_that_a_stream_lacks_are_refused(shards: Path) -> None:
    plain = Recipe(crop_px=32)
    with pytest.raises(ValueError, match="a stream does not have"):
        build_loader(shards, plain, "dali", batch_size=6, reading="stream", drop_last=False)
    with pytest.raises(ValueError, match="reading is 'map'"):
        build_loader(shards, plain, "dali", batch_size=6, reading="map")
