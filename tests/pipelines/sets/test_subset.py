"""Subsets are balanced, nested and survive a round trip through a list; lists are matched or refused."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import build_loader, evaluation_batches, open_set
from pipelines.recipe import Recipe, evaluation
from pipelines.sets.subset import balanced_subset, lines_of, listed_subset

VIEW = evaluation(Recipe(crop_px=16))


@settings(deadline=None)  # the first call may compile a kernel
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=200),
    st.floats(0.001, 1.0),
    st.floats(0.001, 1.0),
    st.integers(0, 2**64 - 1),
)
def test_the_same_share_of_each_class(labels: list[int], share: float, other: float, seed: int) -> None:
    label_N = np.array(labels)
    subset = balanced_subset(label_N, share, seed)
    assert (np.diff(subset) > 0).all() and subset.min() >= 0 and subset.max() < len(labels)
    for name in set(labels):
        count = labels.count(name)
        assert (label_N[subset] == name).sum() == max(1, int(count * share + 0.5))
    smaller, larger = (set(balanced_subset(label_N, s, seed).tolist()) for s in sorted((share, other)))
    assert smaller <= larger


def test_the_seed_decides_the_draw() -> None:
    label_N = np.repeat(np.arange(10), 100)
    first, again, other = (balanced_subset(label_N, 0.1, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and len(np.intersect1d(first, other)) < 50
    # All images are equally likely.
    drawn = np.concatenate([balanced_subset(label_N, 0.1, seed) for seed in range(200)])
    assert np.bincount(drawn, minlength=1000).std() == pytest.approx((200 * 0.1 * 0.9) ** 0.5, rel=0.1)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=r"share of labels is .*\(0, 1\]"):
        balanced_subset(np.zeros(3, np.int64), share, 0)


def test_images_without_labels() -> None:
    with pytest.raises(ValueError, match="1 of 2 images have no label"):
        balanced_subset(np.array([0, -1]), 0.5, 0)


@pytest.mark.parametrize("kind", ["beton", "shards", "picture_folder"])
def test_lists_survive_a_round_trip(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    images = open_set(request.getfixturevalue(kind))
    names = list(images.names())
    assert len(set(names)) == images.count == 40
    subset = balanced_subset(images.labels(np.arange(40)), 0.3, 5)
    path = tmp_path / "labels.txt"
    lines = lines_of(images.names, subset)
    assert lines == [names[index] for index in subset]
    path.write_text("\n".join(lines) + "\n")
    assert np.array_equal(listed_subset(images.names, images.count, path), subset)


def test_names_of_files_as_published(tmp_path: Path) -> None:
    names = ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n02/same.png", "n01/same.png"]
    path = tmp_path / "10percent.txt"
    path.write_text("n02_1.JPEG\nn01_2.jpg\n\nn01/same.JPEG")
    assert listed_subset(lambda: names, len(names), path).tolist() == [1, 2, 4]
    path.write_text("data/train/n02/n02_1.JPEG\n1.JPEG\n")
    with pytest.raises(ValueError, match=r"lacks 1 \(such as 1.JPEG\)"):  # whole names only
        listed_subset(lambda: names, len(names), path)
    path.write_text("data/train/n02/n02_1.JPEG\n")
    assert listed_subset(lambda: names, len(names), path).tolist() == [2]
    path.write_text("n01/n02_1.JPEG\n")
    with pytest.raises(ValueError, match="lacks 1"):
        listed_subset(lambda: names, len(names), path)
    path.write_text("n01_1.JPEG\nn03_1.JPEG")
    with pytest.raises(ValueError, match=r"names 2 images, of which the set lacks 1 \(such as n03_1.JPEG\)"):
        listed_subset(lambda: names, len(names), path)
    path.write_text("same.png")
    with pytest.raises(ValueError, match="several images of this name"):
        listed_subset(lambda: names, len(names), path)
    names = ["a/one.jpg", "a/one.png", "b/two.jpg"]
    path.write_text("a/one.png\ntwo.png")
    assert listed_subset(lambda: names, len(names), path).tolist() == [1, 2]
    numbered = [f"pictures.gz#{number}" for number in range(30)]  # nothing but suffixes differ
    path.write_text("pictures.gz#7\npictures.gz#12")
    assert listed_subset(lambda: numbered, 30, path).tolist() == [7, 12]
    nested = ["x/a/one.jpg", "a/one.jpg"]
    path.write_text("a/one.jpg")
    assert listed_subset(lambda: nested, 2, path).tolist() == [1]
    path.write_text("a/one.webp")
    with pytest.raises(ValueError, match="several images of this name"):
        listed_subset(lambda: names, len(names), path)
    path.write_text("#2\n#0\n")
    assert listed_subset(lambda: names, len(names), path).tolist() == [0, 2]
    path.write_text("#3")
    with pytest.raises(ValueError, match=r"has #3, the set's images are #0 … #2"):
        listed_subset(lambda: names, len(names), path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="names 0 images"):
        listed_subset(lambda: names, len(names), path)


def test_names_that_cannot_be_listed() -> None:
    subset = np.array([1])

    def unrecorded() -> list[str]:
        raise ValueError("no names")

    for names in (["a/one.jpg"] * 2, ["x", "two\nlines"], ["x", "#4"], ["x", " blank"]):
        assert lines_of(lambda names=names: names, subset) is None
    assert lines_of(unrecorded, subset) is None
    assert lines_of(lambda: ["x", "\udce9t\udce9.jpg"], subset) == ["\udce9t\udce9.jpg"]  # not UTF-8


def test_a_name_that_is_not_utf8_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(os.fsencode("\udce9t\udce9.jpg"))
    assert listed_subset(lambda: ["x", "\udce9t\udce9.jpg"], 2, path).tolist() == [1]


def test_names_that_are_not_recorded(beton: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.beton"
    alone.write_bytes(beton.read_bytes())
    with pytest.raises(ValueError, match=r"alone.paths names 0 of the 40 images"):
        list(open_set(alone).names())


def test_a_loader_of_a_subset(beton: Path) -> None:
    recipe = Recipe(crop_px=16, num_views=1)
    subset = np.array([3, 7, 8, 20, 21, 39])
    loader = build_loader(beton, recipe, batch_size=2, subset=subset, seed=4)
    everything = build_loader(beton, recipe, batch_size=8, seed=4)
    whole = {int(i): view for batch in everything for i, view in zip(batch.index, batch.query, strict=True)}
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        orders.append(torch.cat([batch.index for batch in batches]).tolist())
        assert sorted(orders[-1]) == subset.tolist()
        for batch in batches if epoch == 0 else ():
            for i, view in zip(batch.index, batch.query, strict=True):
                assert torch.equal(view, whole[int(i)])
    assert orders[0] != orders[1]
    build_loader(beton, recipe, batch_size=2, subset=subset[::-1], seed=4).load_state_dict(
        loader.state_dict()
    )
    for wrong in (np.array([3, 7, 9, 20, 21, 39]), None):
        another = build_loader(beton, recipe, batch_size=2, subset=wrong, seed=4)
        with pytest.raises(ValueError, match="taken with set"):
            another.load_state_dict(loader.state_dict())
    for bad in (np.array([40]), np.array([-1]), np.array([], np.int64)):
        with pytest.raises(ValueError, match=r"give at least one, with positions in \[0, 40\)"):
            build_loader(beton, recipe, batch_size=1, subset=bad)


def test_a_bad_image_is_replaced_by_one_of_the_subset(picture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(picture_folder, root)
    for name in ("bird/07.JPEG", "cat/19.JPEG"):  # the last one is replaced by the first of the subset
        (root / name).write_bytes(b"broken")
    subset = np.array([2, 7, 11, 39])
    loader = build_loader(root, Recipe(crop_px=16, num_views=1), batch_size=4, subset=subset)
    (batch,) = loader
    assert sorted(batch.index.tolist()) == [2, 2, 11, 11] and set(loader.faults) == {7, 39}


@pytest.mark.parametrize(("batch_size", "limit"), [(16, None), (3, None), (5, 17), (512, 40)])
def test_processes_share_an_evaluation(beton: Path, batch_size: int, limit: int | None) -> None:
    def seen(rank: int, world_size: int) -> torch.Tensor:
        share = evaluation_batches(
            beton, VIEW, batch_size=batch_size, limit=limit, rank=rank, world_size=world_size
        )
        return torch.cat([torch.empty(0, 3, 16, 16), *(images for images, _ in share)])

    alone = seen(0, 1)
    for world_size in (3, 8):
        shares = [seen(rank, world_size) for rank in range(world_size)]
        assert len(shares[0]) == max(map(len, shares))
        assert torch.equal(torch.cat(shares), alone) and len(alone) == (limit or 40)
