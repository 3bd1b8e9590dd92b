"""DALI's own reader: what its stream promises, how it resumes, and what it says of shards that do not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines import Backend, Batch, Recipe, ViewLoader, build_loader
from pipelines.recipe import Mixing

RECIPE = Recipe(crop_px=32, mixing=Mixing(method="mixmask"))


def _stream(path: Path, backend: Backend = "dali", **options: object) -> ViewLoader:
    return build_loader(path, RECIPE, backend, **{"batch_size": 6, "seed": 3, "reading": "stream"} | options)  # type: ignore[arg-type]


def _indices(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.index]


def test_every_picture_once_and_its_views_are_those_of_any_other_reading(shards: Path) -> None:
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
    with pytest.raises(ValueError, match=r"streamed_to 0, this run has 1; resume with the same .* reading"):
        _stream(shards).load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="backend dali, this run has ffcv"):
        _stream(shards, "ffcv").load_state_dict(_stream(shards).state_dict())


def test_in_order_without_shuffling(shards: Path) -> None:
    index = build_loader(shards, RECIPE, "dali", batch_size=6).engine.store.shard_set.index  # type: ignore[attr-defined]
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


def _spoil_index(copy: Path) -> None:
    (copy / "000003.idx").write_text("what is this")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_index, r"000002\.idx is missing, which DALI's reader needs; index the shards"),
        (_swap_indices, "is no picture by the index of .* file does not fit its tar"),
        (_shift_index, "is no picture by the index of .* file does not fit its tar"),
        (_shorten_index, r"name 39 pictures, its manifest 40"),
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
def test_a_tar_cut_short_while_the_run_is_on_is_named(reading: str, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    loader = _stream(copy, reading=reading)
    tar = copy / "000004.tar"
    with tar.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match=r"000004\.tar"):
        list(loader)


@pytest.mark.parametrize("reading", ["auto", "stream"])
def test_a_tar_cut_short_or_gone_before_is_refused(reading: str, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    tar = copy / "000004.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"000004\.tar has 2000 bytes, the manifest says"):
        _stream(copy, reading=reading)
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"000004\.tar is missing"):
        _stream(copy, reading=reading)


def test_a_damaged_picture_in_a_shard_is_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy.shards")
    store = build_loader(copy, RECIPE, "dali", batch_size=6).engine.store  # type: ignore[attr-defined]
    record = store.shard_set.index[11]
    with store.shard_set.tar_path(int(record["shard"])).open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(bytes(300))
    for reading in ("read", "stream"):
        loader = _stream(copy, reading=reading, batch_size=8)
        assert len(list(loader)) == 5
        assert {i: fault.replaced_by for i, fault in loader.faults.items()} == {11: 12}
        assert "bird/11.jpg in 0000" in loader.faults[11].name


def test_options_that_do_not_go_with_a_stream_are_refused(shards: Path) -> None:
    plain = Recipe(crop_px=32)
    with pytest.raises(ValueError, match="a stream does not have"):
        build_loader(shards, plain, "dali", batch_size=6, reading="stream", drop_last=False)
    with pytest.raises(ValueError, match="reading is 'map'"):
        build_loader(shards, plain, "dali", batch_size=6, reading="map")
