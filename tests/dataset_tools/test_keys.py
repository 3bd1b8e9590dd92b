import os
import re

from hypothesis import example, given
from hypothesis import strategies as st

from dataset_tools.shard_writer import Keys, decode_key, encode_key, without_suffix
from dataset_tools.tars import split_name

PARTS = st.text("aB.% /_-~ü\udcff\n\\", min_size=1, max_size=6).filter(
    lambda path: all(part not in ("", ".", "..") for part in path.split("/"))
)
NAMES = st.builds(
    lambda stem, suffix: stem + suffix, PARTS, st.sampled_from(["", ".jpg", ".JPG", ".png", ".jpg.png"])
)


@given(NAMES)
def test_a_key_is_plain_and_decodes_to_its_path(path: str) -> None:
    key = encode_key(path)
    assert re.fullmatch(r"[A-Za-z0-9_~%./-]+", key)
    assert split_name(f"{key}.jpg") == (key, "jpg")
    assert not any(part.startswith(".") for part in key.split("/"))
    assert decode_key(key) == path


@given(st.lists(NAMES, unique=True, min_size=1, max_size=12))
@example(["a.jpg", "a.png", "a.jpg.png"])
@example(["a", "a.jpg", "a%2Ejpg", "a%2Ejpg.png"])
def test_keys_are_unique(paths: list[str]) -> None:
    keys = Keys(paths)
    found = [keys(i, path) for i, path in enumerate(paths)]
    assert len(set(found)) == len(paths)
    for path, key in zip(paths, found, strict=True):
        assert decode_key(key) in (path, without_suffix(path))


def test_suffixes_stay_only_where_needed() -> None:
    paths = ["n01/x_1.JPEG", "n01/two.jpg", "n01/two.png", "n02/two.jpg", "v1.0/a.b.jpg"]
    keys = Keys(paths)
    assert [keys(i, path) for i, path in enumerate(paths)] == [
        "n01/x_1", "n01/two%2Ejpg", "n01/two%2Epng", "n02/two", "v1.0/a%2Eb",
    ]  # fmt: skip


def test_keys_of_many_images() -> None:
    paths = [f"{i % 7}/{i // 2}.{'jpg' if i % 2 else 'png'}" for i in range(1001)]
    keys = Keys(paths)
    assert len({keys(i, path) for i, path in enumerate(paths)}) == 1001
    assert os.path.sep not in encode_key("a b")
