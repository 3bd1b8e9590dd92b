"""No image of a tar is lost silently: it is kept or listed as left out, or the program fails."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset_tools.__main__ import main
from dataset_tools.index_shards import index_shards
from dataset_tools.sources import FolderSource
from dataset_tools.tar_source import TarSource
from dataset_tools.tars import scan_tar
from dataset_tools.verify import verify
from pipelines.sets.manifest import Manifest
from pipelines.sets.shards import open_shards
from tests.dataset_tools.conftest import encode
from tests.dataset_tools.test_tar_source import pack

Capture = pytest.CaptureFixture[str]
BLOCK = 512
NUM = 8


def images(kind: str = "loose") -> list[tuple[str, bytes]]:
    folder = {"loose": "", "filed": "cats/", "shard": ""}[kind]
    files = [(f"{folder}{n}.jpg", encode(40 + n, 30 + n)) for n in range(NUM)]
    if kind == "shard":
        files = [pair for n, file in enumerate(files) for pair in (file, (f"{n}.cls", b"%d" % (n % 2)))]
    return files


def headers(tar: Path) -> dict[str, int]:
    """Offset of the header of each file; names are short."""
    return {member.name: member.offset - BLOCK for member in scan_tar(tar)}


def spoilt(tar: Path, start: int, stop: int, content: bytes = b"\0") -> None:
    data = bytearray(tar.read_bytes())
    stop = min(stop, len(data))
    data[start:stop] = content * (stop - start)
    tar.write_bytes(data)


@pytest.mark.parametrize("kind", ["loose", "filed"])
@pytest.mark.parametrize("number", range(NUM))
def test_a_zeroed_header_is_an_error(kind: str, number: int, tmp_path: Path) -> None:
    tar = pack(tmp_path / "x.tar", images(kind))
    name, at = list(headers(tar).items())[number]
    spoilt(tar, at, at + BLOCK)
    sentence = rf" has its end mark at byte {at} of \d+, but behind it byte \d+ is not zero: "
    advice = ".*fetch or make it again, or take .* with --accept-truncated"
    with pytest.raises(ValueError, match="^" + re.escape(str(tar)) + sentence + advice):
        TarSource(tar)
    if number:
        source = TarSource(tar, accept_truncated=True)
        assert [source.path(i) for i in range(len(source))] == [file for file, _ in images(kind)[:number]]
        (damage,) = source.passed_over
        assert re.match("damaged: x.tar" + sentence, damage)
    assert name.endswith(f"{number}.jpg")


@pytest.mark.parametrize("place", ["inner header", "outer header"])
def test_a_hole_in_a_tar_of_tars_is_an_error(place: str, tmp_path: Path) -> None:
    inner = [(f"n{k}.tar", pack(tmp_path / "inner", images()).read_bytes()) for k in range(3)]
    tar = pack(tmp_path / "train.tar", inner)
    at = headers(tar)["n1.tar"]
    if place == "inner header":
        at += BLOCK + headers(tmp_path / "inner")["4.jpg"]
    spoilt(tar, at, at + BLOCK)
    with pytest.raises(
        ValueError, match="n1.tar has its end" if place == "inner header" else "train.tar has"
    ):
        TarSource(tar)
    source = TarSource(tar, accept_truncated=True)
    assert len(source) == (NUM + 4 + NUM if place == "inner header" else NUM)
    assert sum(source.passed_over.values()) == 1


@given(start=st.integers(0, 60), length=st.integers(1, 60), content=st.sampled_from([b"\0", b"\xff", b"a"]))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_an_error_or_leaves_the_list_as_it_was(
    tmp_path: Path, start: int, length: int, content: bytes
) -> None:
    tar = pack(tmp_path / "x.tar", images())
    end = max(headers(tar).values()) + BLOCK
    # Zeros from a header to the end of the file look like a tar that ends there.
    first, stop = start * BLOCK, min((start + length) * BLOCK, end + 100)
    spoilt(tar, first, stop, content)
    try:
        found = len(TarSource(tar))
    except ValueError:
        return
    assert found == NUM


def test_a_tar_with_many_zeros_at_its_end_is_an_error(tmp_path: Path) -> None:
    """A download that reserved its space and did not finish."""
    tar = pack(tmp_path / "x.tar", images())
    size = tar.stat().st_size
    end = max(headers(tar).values()) + BLOCK + len(images()[-1][1])
    end += -end % BLOCK
    with tar.open("ab") as file:
        file.truncate(size + 20_000)
    with pytest.raises(ValueError, match=r"behind it there are over 10,240 zeros"):
        TarSource(tar)
    # Some programs do not pad at all, others by a whole record.
    for padding in (2 * BLOCK, 10_240):
        with tar.open("r+b") as file:
            file.truncate(end + padding)
        assert len(TarSource(tar)) == NUM


def test_joined_tars_are_an_error(tmp_path: Path) -> None:
    tar = pack(tmp_path / "x.tar", images())
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(ValueError, match="several tars were joined"):
        TarSource(tar)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_all_images_of_a_truncated_tar_are_kept_or_listed(
    cut: float, tmp_path: Path, capsys: Capture
) -> None:
    tar = pack(tmp_path / "x.tar", images())
    tar.write_bytes(tar.read_bytes()[: int(max(headers(tar).values()) * cut)])
    assert main(["convert", str(tar), str(tmp_path / "x.beton")]) == 2
    assert "--accept-truncated" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tar]
    options = ["--accept-truncated", "--max-bad", "0.5"]
    assert main(["convert", str(tar), str(tmp_path / "x.beton"), *options]) == 0
    out = capsys.readouterr().out
    assert "1 damaged: x.tar " in out
    manifest = Manifest.read(tmp_path / "x.beton")
    assert manifest is not None
    listed = len(TarSource(tar, accept_truncated=True))
    names = tmp_path / "x.skipped.txt"
    named = names.read_text().splitlines() if names.exists() else []
    assert manifest.count + len(named) == listed
    assert not named or f"{listed} listed" in out.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("number", [1, 6, 15])
def test_a_hole_in_a_shard_is_an_error(number: int, tmp_path: Path, capsys: Capture) -> None:
    pack(tmp_path / "a.tar", images("shard"))
    hole = pack(tmp_path / "b.tar", images("shard"))
    at = list(headers(hole).values())[number]
    index_shards(tmp_path)
    assert len(open_shards(tmp_path)) == 2 * NUM and verify(tmp_path).ok
    spoilt(hole, at, at + BLOCK)
    (problem,) = verify(tmp_path).problems
    assert problem.startswith(f"{hole} has its end mark at byte {at} of ")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["index", str(tmp_path)]) == 2
    assert f"{hole} has its end mark at byte {at}" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert main(["index", str(tmp_path), "--accept-truncated"]) == 0
    assert "1 damaged: b.tar has its end mark" in capsys.readouterr().out
    assert len(open_shards(tmp_path)) == NUM + (number + 1) // 2
    assert verify(tmp_path).ok, "accepted damage is not reported"
    assert main(["index", str(tmp_path), "--dali-only"]) == 2
    assert main(["index", str(tmp_path), "--dali-only", "--accept-truncated"]) == 0
    assert main(["convert", str(tmp_path), str(tmp_path / "x.beton")]) == 2
    assert main(["convert", str(tmp_path), str(tmp_path / "x.beton"), "--accept-truncated"]) == 0


def test_a_truncated_shard_gives_a_usable_set(tmp_path: Path, capsys: Capture) -> None:
    pack(tmp_path / "a.tar", images("shard"))
    cut = pack(tmp_path / "b.tar", images("shard"))
    at = headers(cut)["5.jpg"]
    cut.write_bytes(cut.read_bytes()[: at + BLOCK + 200])
    (tmp_path / "c.tar").touch()
    assert main(["index", str(tmp_path)]) == 2
    assert "is cut short" in capsys.readouterr().err
    assert main(["index", str(tmp_path), "--accept-truncated"]) == 0
    out = capsys.readouterr().out
    assert "1 damaged: b.tar ends within 5.jpg" in out and "1 damaged: c.tar " in out
    assert len(open_shards(tmp_path)) == NUM + 5
    assert verify(tmp_path).ok


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan"])
def test_shares_are_checked(value: str, tmp_path: Path, capsys: Capture) -> None:
    pack(tmp_path / "a.tar", images("shard"))
    for command in (
        ["index", str(tmp_path)],
        ["convert", str(tmp_path / "a.tar"), str(tmp_path / "x.beton")],
    ):
        assert main([*command, "--max-bad", value]) == 2
        assert f"max_bad is {value}; it is a share" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Ignored files and bad images


def test_files_of_other_suffixes_are_counted(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "images"
    for name in ("cats/a.jpg", "cats/b.jpg", "dogs/a.jpg", "cats/notes.txt", "cats/b.TXT", "dogs/README",
                 "dogs/.hidden.jpg", "dogs/c.gif"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(30, 30) if name.endswith(".jpg") else b"x")
    expected = {"ignored: .txt": 2, "ignored: no suffix": 1, "ignored: hidden file": 1, "ignored: .gif": 1}
    assert FolderSource(root).passed_over == expected
    files = [(str(file.relative_to(root)), file.read_bytes()) for file in root.rglob("*") if file.is_file()]
    tar = TarSource(pack(tmp_path / "x.tar", files))
    assert tar.passed_over == expected
    assert main(["convert", str(root), str(tmp_path / "x.beton")]) == 0
    assert main(["convert", str(root), str(tmp_path / "x.shards")]) == 0
    out = capsys.readouterr().out
    assert out.count("2 ignored: .txt\n") == 2
    for name in ("x.beton", "x.shards"):
        manifest = Manifest.read(tmp_path / name)
        assert manifest is not None and manifest.replaced == expected


def test_many_suffixes_are_counted_together(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"file.{n:03}").touch()
    (tmp_path / "a.jpg").touch()
    passed_over = FolderSource(tmp_path).passed_over
    assert len(passed_over) == 21 and passed_over["ignored: other suffixes"] == 80


def test_earlier_files_of_a_name_are_counted(tmp_path: Path) -> None:
    tar = pack(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.jpg", b"4")])
    source = TarSource(tar)
    assert [source.read(i).payload for i in range(2)] == [b"4", b"2"]
    assert source.passed_over == {"ignored: earlier files of the same name": 2}


@pytest.mark.parametrize("output", ["x.beton", "x.shards"])
def test_too_many_bad_images_fail(output: str, tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for n in range(300):
        (root / f"{n:03}.jpg").write_bytes(b"bad" if n in (7, 100, 150, 299) else encode(20 + n % 3, 20))
    command = ["convert", str(root), str(tmp_path / output), "--workers", "2"]
    shards = ["--shard-size", "50"] if output == "x.shards" else []
    assert main([*command, *shards]) == 2
    printed = capsys.readouterr().err
    assert (
        "4 of 300 images of images cannot be used (4 not a picture), --max-bad 0.01 allows 3; the last"
        in printed
    )
    assert not (tmp_path / "x.beton").exists() and not (tmp_path / output / "set.json").exists()
    (root / "007.jpg").write_bytes(encode(20, 20))
    assert main([*command, *shards, *(["--overwrite"] if shards else [])]) == 0
    assert "300 listed" in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / output)
    assert manifest is not None and (manifest.count, manifest.replaced) == (
        297,
        {"skipped: not a picture": 3},
    )


def test_bad_images_of_shards_made_before_count_too(tmp_path: Path, tree: Path, capsys: Capture) -> None:
    (tree / "cats" / "bad.jpg").write_bytes(b"bad")
    out = tmp_path / "x.shards"
    command = ["convert", str(tree), str(out), "--shard-size", "1"]
    for shards in ("0:3", "3:6"):
        assert main([*command, "--shards", shards, "--max-bad", "0.5"]) == 0
    made = {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    assert main(command) == 2
    assert "1 of 6 images of images cannot be used" in capsys.readouterr().err
    assert main([*command, "--max-bad", "0.5"]) == 0
    assert {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")} == made
    assert verify(out).ok


@pytest.mark.parametrize("shards", [["--shards", "0:3"], []])
def test_repaired_images_are_taken(shards: list[str], tmp_path: Path, capsys: Capture) -> None:
    root, out = tmp_path / "images", tmp_path / "x.shards"
    root.mkdir()
    for n in range(30):
        (root / f"{n:02}.jpg").write_bytes(b"bad" if n % 5 == 0 else encode(20 + n, 20))
    command = ["convert", str(root), str(out), "--shard-size", "10", "--max-bad", "0.17"]
    assert main([*command, *shards]) == 2
    assert "6 of 30 images of images cannot be used (6 not a picture)" in capsys.readouterr().err
    assert main([*command, *shards]) == 2, "shards made before count too"
    for n in range(0, 30, 5):
        (root / f"{n:02}.jpg").write_bytes(encode(20 + n, 20))
    assert main(command) == 0
    assert len(open_shards(out)) == 30 and verify(out).ok
