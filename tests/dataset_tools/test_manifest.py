import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.disk import write_manifest
from pipelines.sets.manifest import Manifest, read_source_path, source_path_line

MANIFEST = Manifest(
    tier="jpeg", count=3, num_bytes=99, sha256="ab" * 32, source="träin", classes=("a", "ü"),
    replaced={"transcoded: PNG": 1}, settings={"quality": 95, "max_side": None},
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    written = write_manifest(MANIFEST, tmp_path / "set.beton")
    assert written == tmp_path / "set.json"
    assert Manifest.read(tmp_path / "set.beton") == MANIFEST
    assert [p.name for p in tmp_path.iterdir()] == ["set.json"]


def test_missing_is_none(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path / "set.beton") is None
    assert read_source_path(tmp_path / "set.beton", 0) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, "unknown keys"),
        ({"version": 2}, "version 2"),
        ({"count": "3"}, "count is '3'"),
        ({"count": True}, "count is True"),
        ({"classes": "ab"}, "classes is 'ab'"),
        ({"tier": "gif"}, "tier is 'gif'"),
        ({"sha256": None}, "sha256 is None"),
    ],
)
def test_bad_content_is_an_error_with_the_file(tmp_path: Path, change: dict[str, object], words: str) -> None:
    content = json.loads(json.dumps(dataclasses.asdict(MANIFEST))) | change
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        Manifest.read(tmp_path / "set.beton")
    assert "set.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": 1}', b"\xff\xfe"])
def test_malformed_files_are_errors(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "set.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"set\.json"):
        Manifest.read(tmp_path / "set.beton")


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=8
    )
)
def test_source_paths_survive_any_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    beton = tmp_path_factory.mktemp("paths") / "set.beton"
    beton.with_suffix(".paths").write_bytes(b"".join(source_path_line(name) for name in names))
    assert [read_source_path(beton, i) for i in range(len(names))] == names
    assert read_source_path(beton, len(names)) is None
    assert read_source_path(beton, -1) is None
