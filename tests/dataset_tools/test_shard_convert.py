import functools
import gc
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset_tools import convert as conversion
from dataset_tools import shard_writer
from dataset_tools.__main__ import main
from dataset_tools.convert import Sharding, make_shards
from dataset_tools.normalise import Normalising
from dataset_tools.shard_plan import FACTS_KEY, Plan
from dataset_tools.shard_writer import decode_key
from dataset_tools.sources import FolderSource, ShardSource
from dataset_tools.tar_source import TarSource
from dataset_tools.work import Work
from pipelines.randomness import EpochOrder
from pipelines.sets.shards import is_shard_set, open_shards, set_digest
from tests.dataset_tools.test_tar_source import files_of, pack

convert = functools.partial(conversion.convert, max_bad=0.5)
"""One file of `photos` is not a picture."""

ROOT = Path(__file__).resolve().parents[2]
Encode = Callable[..., bytes]
Capture = pytest.CaptureFixture[str]
SMALL = Sharding(shard_size=3, seed=5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images of two classes and a bad one; two have the same stem, one of them is a PNG."""
    from tests.dataset_tools.conftest import encode

    root = tmp_path_factory.mktemp("in") / "photos"
    for i in range(9):
        path = root / ("ape" if i % 3 else "bee") / f"{i} p.v{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(40 + i, 30 + i))
    (root / "ape" / "twin.png").write_bytes(encode(33, 21, kind="PNG"))
    (root / "ape" / "twin.jpg").write_bytes(encode(34, 22))
    (root / "bee" / "bad.jpg").write_bytes(b"bad")
    return root


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that every conversion must reproduce byte for byte."""
    out = tmp_path_factory.mktemp("whole") / "photos.shards"
    convert(FolderSource(photos), out, sharding=SMALL, workers=1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_is_where_the_index_says(photos: Path, whole: Path) -> None:
    source, shards = FolderSource(photos), open_shards(whole)
    kept = [i for i in range(len(source)) if source.path(i) != "bee/bad.jpg"]
    assert len(shards) == len(kept) == 11
    assert [shard.name for shard in shards.shards] == [f"00000{i}.tar" for i in range(4)]
    for i, from_source in enumerate(kept):
        sample = source.read(from_source)
        assert shards.index[i]["label"] == sample.label
        if sample.path.endswith("png"):
            assert shards.payload(i)[:2].tobytes() == b"\xff\xd8"
        else:
            assert shards.payload(i).tobytes() == sample.payload
    assert shards.index["width"].tolist()[:3] == [41, 42, 44]
    assert shards.member_name(0) == "ape/1%20p%2Ev1.jpg"
    assert {shards.member_name(i) for i in (6, 7)} == {"ape/twin%2Ejpg.jpg", "ape/twin%2Epng.jpg"}
    assert shards.manifest.classes == ("ape", "bee")
    assert shards.manifest.replaced == {"skipped: not a picture": 1, "transcoded: PNG": 1}
    assert (whole / "skipped.txt").read_text() == "bee/bad.jpg: not a picture\n"
    assert shards.manifest.sha256 == set_digest(shards.shards, shards.index)


def test_shards_hold_the_order_of_the_seed(photos: Path, whole: Path) -> None:
    source, order = FolderSource(photos), EpochOrder(5, 0, 12)
    found = []
    for number in range(4):
        with tarfile.open(whole / f"{number:06d}.tar") as tar:
            found += [m.name.removesuffix(".jpg") for m in tar if m.name.endswith(".jpg")]
    expected = [source.path(int(i)) for i in order[:] if source.path(int(i)) != "bee/bad.jpg"]
    stems = [name.replace("%20", " ").replace("%2E", ".") for name in found]
    assert [path in (stem, stem + ".JPEG") for path, stem in zip(expected, stems, strict=True)] == [True] * 11


def test_tars_are_plain_and_have_no_times(whole: Path) -> None:
    with tarfile.open(whole / "000000.tar") as tar:
        members = list(tar)
        pairs = list(zip(members[::2], members[1::2], strict=True))
        assert all(p.name[:-4] == c.name[:-4] and c.name.endswith(".cls") for p, c in pairs)
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
        for image, label in pairs:
            stored = tar.extractfile(label)
            assert stored is not None
            assert stored.read() == (b"0" if image.name.startswith("ape/") else b"1")
    assert (whole / "000000.tar").stat().st_size % tarfile.RECORDSIZE == 0
    listed = subprocess.run(["tar", "-tf", whole / "000000.tar"], capture_output=True, check=True, text=True)
    assert listed.stderr == ""
    assert len(listed.stdout.splitlines()) == len(members)


def test_the_dali_index_is_what_wds2idx_writes(whole: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    for tar in sorted(whole.glob("*.tar")):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "idx").read_bytes()


def read_by_dali(folder: Path, **options: Any) -> list[tuple[bytes, bytes]]:
    """All (image, label) in the order of the tars."""
    dali = pytest.importorskip("nvidia.dali")
    tars = sorted(folder.glob("*.tar"))
    count = len(open_shards(folder))

    @dali.pipeline_def(batch_size=count, num_threads=1, device_id=None)
    def reader() -> Any:
        return tuple(dali.fn.readers.webdataset(paths=[str(t) for t in tars], ext=["jpg", "cls"], **options))

    pipeline = reader()
    pipeline.build()
    images, labels = pipeline.run()
    return [(bytes(images.at(i)), bytes(labels.at(i))) for i in range(count)]


@pytest.mark.parametrize("indexed", [True, False])
def test_dali_reads_every_image_and_label(
    photos: Path, tmp_path: Path, encode: Encode, indexed: bool
) -> None:
    """Also with names too long for a tar's header, with DALI's index and without."""
    root = tmp_path / "in"
    for name in ("a/" + "x" * 110, "b" * 90 + "/" + "c" * 90 + "/" + "d" * 90, "a/short"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.jpg").write_bytes(encode(30 + len(name), 20))
    out = tmp_path / "x.shards"
    source = FolderSource(root)
    convert(source, out, sharding=Sharding(shard_size=2))
    options = {"index_paths": [str(idx) for idx in sorted(out.glob("*.idx"))]} if indexed else {}
    expected = [(source.read(i).payload, b"%d" % source.read(i).label) for i in range(3)]
    assert sorted(read_by_dali(out, **options)) == sorted(expected)
    shards = open_shards(out)
    assert [shards.payload(i).tobytes() for i in range(3)] == [payload for payload, _ in expected]


def test_webdataset_reads_every_image_and_label(photos: Path, whole: Path) -> None:
    source = FolderSource(photos)
    expected = {
        source.path(i): source.label(i) for i in range(len(source)) if source.path(i) != "bee/bad.jpg"
    }
    shards = webdataset.WebDataset(sorted(map(str, whole.glob("*.tar"))), shardshuffle=False).decode("rgb8")
    found = {sample["__key__"]: sample for sample in shards}
    assert sorted(sample["cls"] for sample in found.values()) == sorted(expected.values())
    for key, sample in found.items():
        stem = decode_key(key)
        path = next(path for path in expected if path == stem or path.rpartition(".")[0] == stem)
        assert sample["cls"] == expected[path] and sample["jpg"].shape[2] == 3


def test_without_classes_there_are_no_labels(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(encode())
    convert(FolderSource(tmp_path / "flat"), tmp_path / "x.shards")
    with tarfile.open(tmp_path / "x.shards" / "000000.tar") as tar:
        assert tar.getnames() == ["a.jpg"]
    assert open_shards(tmp_path / "x.shards").index["label"].tolist() == [-1]


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_change_a_byte(photos: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    convert(FolderSource(photos), tmp_path / "x.shards", sharding=SMALL, workers=workers)
    assert contents(tmp_path / "x.shards") == contents(whole)


def test_a_tar_gives_the_set_of_its_folder(photos: Path, whole: Path, tmp_path: Path) -> None:
    tar = pack(tmp_path / "photos.tar", files_of(photos))
    convert(TarSource(tar), tmp_path / "x.shards", sharding=SMALL)
    found, expected = contents(tmp_path / "x.shards"), contents(whole)
    assert found.pop("set.json").replace(b"photos.tar", b"photos") == expected.pop("set.json")
    assert found == expected


def test_shards_become_one_file_and_shards_again(photos: Path, whole: Path, tmp_path: Path) -> None:
    of_shards = convert(ShardSource(whole), tmp_path / "a.beton").manifest
    of_folder = convert(FolderSource(photos), tmp_path / "b.beton").manifest
    assert (of_shards.sha256, of_shards.classes) == (of_folder.sha256, of_folder.classes)
    lines = (tmp_path / "a.paths").read_text().splitlines()
    assert lines[0] == "ape/1 p.v1.jpg"
    convert(ShardSource(whole), tmp_path / "x.shards", sharding=SMALL)
    again = open_shards(tmp_path / "x.shards")
    assert [again.member_name(i) for i in range(11)] == [open_shards(whole).member_name(i) for i in range(11)]


# ------------------------------------------------------------------------------------------------------------
# Parts


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda r: r[0] < r[1]), max_size=3))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_in_any_order_give_the_same_set(
    photos: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    out = tmp_path_factory.mktemp("ranges") / "photos.shards"
    source = FolderSource(photos)
    made: set[int] = set()
    for first, stop in ranges:
        requested = set(range(first, stop))
        done = make_shards(Work(source, Normalising(), 0.5), out, Sharding(3, 5, (first, stop)))
        assert (done.made, done.requested, done.num_shards) == (len(requested - made), len(requested), 4)
        made |= requested
        assert not is_shard_set(out)
        assert {int(p.stem) for p in out.glob("*.tar")} == made
    convert(source, out, sharding=SMALL)
    assert contents(out) == contents(whole)


def test_parts_of_two_machines_are_merged(photos: Path, whole: Path, tmp_path: Path) -> None:
    for machine, shards in (("a", (0, 2)), ("b", (2, 4))):
        make_shards(
            Work(FolderSource(photos), Normalising(), 0.5),
            tmp_path / f"{machine}.shards",
            Sharding(3, 5, shards),
        )
    for path in (tmp_path / "b.shards").iterdir():
        path.replace(tmp_path / "a.shards" / path.name)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a.shards").glob("*.tar")}
    convert(FolderSource(photos), tmp_path / "a.shards", sharding=SMALL)
    assert contents(tmp_path / "a.shards") == contents(whole)
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a.shards").glob("*.tar")}


class Stopped(BaseException):
    """Leaves the files of a killed process, because nothing is cleaned up after it."""


def interruptions(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes the n-th write, rename or removal from now on fail."""
    steps = itertools.count()
    limit = [10**9]

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if next(steps) >= limit[0]:
                raise Stopped
            return function(*args, **kwargs)

        return guarded

    for owner, name in (
        (os, "fsync"), (Path, "replace"), (Path, "unlink"), (shard_writer.TarWriter, "_write"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    monkeypatch.setattr(shard_writer.TarWriter, "close", lambda self: self._out.file.flush())

    def arm(after: int) -> None:
        limit[0] = next(steps) + after

    return arm


def test_stopped_at_any_step_it_continues_to_the_same_bytes(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "photos.shards"
    source = FolderSource(photos)
    arm = interruptions(monkeypatch)
    stops = 0
    for _ in range(200):
        arm(3 + 7 * (stops % 5))
        try:
            convert(source, out, sharding=SMALL, workers=1)
            break
        except (Stopped, FileExistsError) as error:
            assert isinstance(error, Stopped), "the lock of the stopped writer is still held"
            stops += 1
        gc.collect()  # what a writer holds ends with its process
    arm(10**9)
    assert stops > 5
    assert {name: data for name, data in contents(out).items() if "partial" not in name} == contents(whole)


SLOW = """
import sys, time
from dataset_tools.convert import Sharding, convert
from dataset_tools.sources import FolderSource

class Slow(FolderSource):
    def read(self, index):
        time.sleep(0.1)
        return super().read(index)

convert(Slow(sys.argv[1]), sys.argv[2], sharding=Sharding(3, 5), workers=1, max_bad=0.5)
"""


def test_killed_it_continues_to_the_same_bytes(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.shards"
    begun = out / "000001.tar.partial"
    with subprocess.Popen([sys.executable, "-c", SLOW, str(photos), str(out)], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert begun.exists()
    assert not is_shard_set(out)
    written = (out / "000000.tar").stat().st_mtime_ns
    convert(FolderSource(photos), out, sharding=SMALL)
    assert contents(out) == contents(whole)
    assert (out / "000000.tar").stat().st_mtime_ns == written, "a complete shard is not made again"


@pytest.mark.parametrize(
    "harm", ["cut tar", "no tar", "idx", "no idx", "cut part", "empty part", "foreign part"]
)
def test_an_incomplete_shard_is_made_again(photos: Path, whole: Path, tmp_path: Path, harm: str) -> None:
    out = tmp_path / "photos.shards"
    make_shards(Work(FolderSource(photos), Normalising(), 0.5), out, Sharding(3, 5, (0, 2)))
    what, kind = harm.split(" ") if " " in harm else ("changed", harm)
    path = out / f"000001.{kind.replace('part', 'part.npz')}"
    if what == "no":
        path.unlink()
    elif what == "foreign":
        (out / "000000.part.npz").replace(path)
        np.savez(out / "000000.part.npz", records=np.zeros(3), **{FACTS_KEY: np.zeros(2, np.uint8)})
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-100], "changed": content[:-2] + b"x\n", "empty": b""}[what])
    convert(FolderSource(photos), out, sharding=SMALL)
    assert contents(out) == contents(whole)


def test_two_machines_may_begin_at_the_same_time(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the plan under the same temporary name, and the second finds it renamed."""
    write = Plan.write

    def renamed_by_the_other(self: Plan, folder: Path) -> None:
        write(self, folder)
        raise FileNotFoundError

    monkeypatch.setattr(Plan, "write", renamed_by_the_other)
    convert(FolderSource(photos), tmp_path / "photos.shards", sharding=SMALL)
    assert contents(tmp_path / "photos.shards") == contents(whole)
    make_shards(Work(FolderSource(photos), Normalising(), 0.5), tmp_path / "x.shards", Sharding(3, 5, (0, 1)))
    with pytest.raises(FileExistsError, match=r"has begun .* seed 5, now 6"):
        make_shards(
            Work(FolderSource(photos), Normalising(), 0.5), tmp_path / "x.shards", Sharding(3, 6, (1, 2))
        )


def test_a_complete_set_is_kept(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.shards"
    convert(FolderSource(photos), out, sharding=SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done: list[None] = []
    again = convert(FolderSource(photos), out, sharding=SMALL, progress=lambda: done.append(None))
    assert again.already_there
    assert (again.num_skipped, len(done)) == (1, 12)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"000001\.tar is missing"):
        convert(FolderSource(photos), out, sharding=SMALL)


def test_another_plan_is_refused_or_replaces_with_overwrite(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "photos.shards"
    source = FolderSource(photos)
    make_shards(Work(source, Normalising(quality=50), 0.5), out, Sharding(2, 5, (0, 6)))
    with pytest.raises(FileExistsError, match=r"has begun .* shard_size 2, now 3, quality 50, now 95"):
        convert(source, out, sharding=SMALL)
    convert(source, out, sharding=SMALL, overwrite=True)
    assert contents(out) == contents(whole), "nothing is left of the six shards before"
    with pytest.raises(FileExistsError, match="made of other images or with other options"):
        convert(source, out, sharding=Sharding(3, 6))
    convert(source, out, sharding=Sharding(3, 6), overwrite=True)
    convert(source, out, sharding=SMALL, overwrite=True)
    assert contents(out) == contents(whole)


def test_tars_of_other_programs_are_never_replaced(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "photos.shards"
    out.mkdir()
    pack(out / "000000.tar", [("a.jpg", (photos / "ape" / "1 p.v1.JPEG").read_bytes())])
    mine = (out / "000000.tar").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not made by a conversion"):
            convert(FolderSource(photos), out, overwrite=overwrite)
    assert main(["index", str(out)]) == 0
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="was indexed in place"):
            convert(FolderSource(photos), out, overwrite=overwrite)
    assert (out / "000000.tar").read_bytes() == mine


def test_a_shard_of_bad_images_has_no_tar(tmp_path: Path, encode: Encode) -> None:
    root = tmp_path / "in"
    root.mkdir()
    order = EpochOrder(0, 0, 6)[:]
    for place, index in enumerate(order.tolist()):
        (root / f"{index}.jpg").write_bytes(b"bad" if place in (2, 3) else encode(20 + index))
    out = tmp_path / "x.shards"
    done = convert(FolderSource(root), out, sharding=Sharding(2), max_bad=0.5)
    shards = open_shards(out)
    assert [(shard.name, shard.count) for shard in shards.shards] == [("000000.tar", 2), ("000002.tar", 2)]
    assert (done.num_skipped, len(shards)) == (2, 4)
    kept = sorted(order[[0, 1, 4, 5]].tolist())
    assert [shards.payload(i).tobytes() for i in range(4)] == [(root / f"{i}.jpg").read_bytes() for i in kept]
    for i in range(6):
        (root / f"{i}.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"none of the 6 images of in can be used: 0\.jpg: not a picture"):
        convert(FolderSource(root), tmp_path / "y.shards", max_bad=1)


def test_a_stop_keeps_complete_shards_and_names_the_image(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.shards"
    with pytest.raises(ValueError, match=r"the last is bee/bad\.jpg: not a picture"):
        convert(FolderSource(photos), out, sharding=Sharding(1, 5), max_bad=0, workers=1)
    assert not list(out.glob("*.partial"))
    source = FolderSource(photos)
    bad = next(i for i in range(12) if source.path(i) == "bee/bad.jpg")
    place = EpochOrder(5, 0, 12)[:].tolist().index(bad)
    assert len(list(out.glob("*.tar"))) == len(list(out.glob("*.part.npz"))) == place


def test_two_conversions_of_one_shard_are_refused(photos: Path, tmp_path: Path) -> None:
    writer = shard_writer.TarWriter(tmp_path / "000000.tar")
    with pytest.raises(FileExistsError, match="another process is writing"):
        shard_writer.TarWriter(tmp_path / "000000.tar")
    writer.close()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------
# The command line


def test_the_commands_print_what_they_made(
    photos: Path, whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "sets" / "photos.shards"
    command = ["convert", str(photos), str(out), "--shard-size", "3", "--seed", "5", "--max-bad", "0.5"]
    assert main([*command, "--shards", "1:3"]) == 0
    assert "2 shards made, 0 were complete, the set has 4. Next: when all exist" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 1
    assert (
        "is incomplete: 2 of 4 shards are complete; run the same conversion again" in capsys.readouterr().out
    )
    assert main(["index", str(out)]) == 2
    assert "is incomplete: 2 of 4" in capsys.readouterr().err
    assert main([*command, "--shards", "0:4"]) == 0
    printed = capsys.readouterr().out
    assert "1 skipped: not a picture" in printed
    assert f"{out}: 11 images of 12 listed, tier jpeg, 0.0 MB in 4 shards, " in printed
    assert f"Next: make pretrain DATA={out}" in printed
    assert contents(out) == contents(whole)
    assert main(command) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("x.shards", ["--tier", "raw"], "name the output x.beton"),
        ("x.shards", ["--shard-size", "0"], "shard_size is 0"),
        ("x.shards", ["--shards", "3"], "give the first shard and the one after the last"),
        ("x.shards", ["--shards", "0:9"], "the set has 0:1"),
        ("x.shards", ["--shards", "0:1", "--overwrite"], "remove the folder by hand"),
        ("x.shards", ["--seed", "-1"], "seed is -1"),
        ("x.shards", ["--workers", "0"], "workers is 0"),
        ("x.shards", ["--labels-file", "x"], "are for a tar"),
        ("x.beton", ["--shard-size", "3"], "--shard-size is for shards; name the output"),
        ("x.beton", ["--seed", "0"], "--seed is for shards"),
        ("x", [], "does not end in .beton"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    photos: Path, tmp_path: Path, capsys: Capture, output: str, options: list[str], words: str
) -> None:
    assert main(["convert", str(photos), str(tmp_path / output), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_prints_that_complete_shards_are_kept(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FolderSource.read

    def interrupted(self: FolderSource, index: int) -> Any:
        if index == EpochOrder(0, 0, 12)[:].tolist()[9]:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(FolderSource, "read", interrupted)
    out = tmp_path / "x.shards"
    assert (
        main(["convert", str(photos), str(out), "--shard-size", "1", "--workers", "1", "--max-bad", "1"])
        == 130
    )
    assert "interrupted; complete shards are kept" in capsys.readouterr().err
    assert not list(out.glob("*.partial"))
    assert 1 <= len(list(out.glob("*.tar"))) <= 9
