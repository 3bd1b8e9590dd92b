"""Replacing a set: one of the two is complete at any time, even if a process is killed or others write."""

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools import disk
from dataset_tools.__main__ import main
from dataset_tools.beton_writer import BetonWriter
from dataset_tools.convert import Sharding, convert, make_shards
from dataset_tools.index_shards import index_shards
from dataset_tools.normalise import Normalising
from dataset_tools.sources import FolderSource
from dataset_tools.verify import verify
from dataset_tools.work import Work
from pipelines.sets.beton import matching_manifest, open_beton
from pipelines.sets.manifest import Manifest, read_source_paths
from pipelines.sets.shards import open_shards, set_aside_path
from pipelines.sets.stores import open_set
from tests.dataset_tools.conftest import encode
from tests.dataset_tools.test_tar_source import pack

Capture = pytest.CaptureFixture[str]
FORMATS = ("set.beton", "set.shards")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def sources(root: Path) -> tuple[FolderSource, FolderSource]:
    """Sources of the old set and of a new one that differs from it in every respect."""
    for name, classes, first in (("old", ("ant", "bee"), 0), ("new", ("cow", "dog", "elk"), 20)):
        for n in range(6):
            file = root / name / classes[n % len(classes)] / f"{name}{n}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"bad" if n == (2 if name == "old" else 9) else encode(30 + first + n, 30))
    return FolderSource(root / "old"), FolderSource(root / "new")


def make(source: FolderSource, out: Path) -> object:
    sharding = Sharding(2) if out.suffix == ".shards" else None
    return convert(source, out, overwrite=True, workers=1, sharding=sharding, max_bad=0.5)


def facts(path: Path) -> tuple[Any, ...]:
    """The contents of a set, after a check that its parts belong together."""
    if path.is_file():
        assert matching_manifest(open_beton(path)) is not None
    store = open_set(path)
    manifest = Manifest.read(path)
    assert manifest is not None
    index = np.arange(store.count)
    payloads = [content.tobytes() for content in store.fetch(index)]
    names = list(read_source_paths(path, store.count)) if path.is_file() else list(store.names())
    return payloads, store.labels(index).tolist(), manifest.classes, names, manifest.replaced


def killed(program: Callable[[], object], folder: Path, operation: int) -> bool:
    """Run in a process that is killed before its n-th file operation; False if it has fewer."""
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event == "open":
                path, _, flags = arguments
                if not (flags & WRITES):
                    return
            elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
                path = arguments[0]
            elif event == "ctypes.dlopen" and arguments[0] is None:
                path = folder  # what follows is the exchange
            else:
                return
            if isinstance(path, int) or str(path).startswith(str(folder)):
                if done == operation:
                    os._exit(9)
                done += 1

        sys.addaudithook(count)
        try:
            program()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


class NoExchange(ctypes.CDLL):
    """The C library of a file system without RENAME_EXCHANGE."""

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("name", [*FORMATS, "set.shards without exchange"])
def test_killed_at_any_operation_one_complete_set_is_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = sources(tmp_path)
    name, _, without = name.partition(" ")
    if without:
        monkeypatch.setattr(ctypes, "CDLL", NoExchange)
    (tmp_path / "expected").mkdir()
    expected = []
    for source in (old, new):
        make(source, tmp_path / "expected" / name)
        expected.append(facts(tmp_path / "expected" / name))
    names = sorted(file.name for file in (tmp_path / "expected").iterdir())
    seen = [0, 0]
    for operation in range(1000):
        folder = tmp_path / f"{operation}"
        folder.mkdir()
        out = folder / name
        make(old, out)
        if without and out.is_dir():
            (out / "notes.txt").write_text("mine")
        if not killed(lambda out=out: make(new, out), folder, operation):
            break
        found = facts(out if out.exists() else set_aside_path(out))
        assert found in expected, f"before operation {operation}"
        assert out.exists() or without
        seen[expected.index(found)] += 1
        assert not out.exists() or verify(out).ok
        make(new, out)
        assert facts(out) == expected[1]
        assert sorted(file.name for file in folder.iterdir()) == names, "something was left behind"
        if without:
            assert (out / "notes.txt").read_text() == "mine"
    assert min(seen) > 2 and sum(seen) == operation > 10
    assert facts(out) == expected[1]


def test_indexing_killed_at_any_operation_leaves_one_complete_set(tmp_path: Path) -> None:
    """Shards that are indexed in place again, with other labels."""
    for operation in range(1000):
        folder = tmp_path / f"{operation}"
        folder.mkdir()
        for tar in "ab":
            pack(folder / f"{tar}.tar", [(f"{n}{end}", data) for n in range(3) for end, data in
                                         ((".jpg", encode(20 + n, 20)), (".cls", b"%d" % n))])  # fmt: skip
        index_shards(folder)
        labels = open_shards(folder).index["label"].tolist()
        again = killed(lambda folder=folder: index_shards(folder, labelled=False), folder, operation)
        found = open_shards(folder)
        assert found.index["label"].tolist() in (labels, [-1] * 6)
        assert (found.manifest.classes == ()) == (found.index["label"].tolist() == [-1] * 6)
        index_shards(folder, labelled=False)
        assert open_shards(folder).index["label"].tolist() == [-1] * 6
        assert not (folder / "index.npy.next").exists()
        if not again:
            break
    assert operation > 3


# ------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("name", FORMATS)
def test_a_replacement_that_fails_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    old, new = sources(tmp_path)
    out = tmp_path / name
    make(old, out)
    before = facts(out)
    (tmp_path / "new" / "cow" / "new0.jpg").write_bytes(b"bad")
    assert main(["convert", str(tmp_path / "new"), str(out), "--overwrite"]) == 2
    assert "1 of 6 images of new cannot be used" in capsys.readouterr().err
    assert facts(out) == before and verify(out).ok
    assert not list(tmp_path.glob(".*")), "nothing takes up the disk"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            make(new, out)
    assert facts(out) == before and verify(out).ok
    make(new, out)
    assert facts(out)[2] == ("cow", "dog", "elk") and verify(out).ok


@pytest.mark.parametrize("name", FORMATS)
def test_names_that_are_not_utf8_are_kept(name: str, tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "images"
    odd = os.fsdecode(b"caf\xe9")
    for label in (odd, "tea"):
        (root / label).mkdir(parents=True)
        (root / label / f"{odd}.jpg").write_bytes(encode(30, 30))
        (root / label / f"bad {odd}.jpg").write_bytes(b"bad")
    out = tmp_path / name
    command = ["convert", str(root), str(out), "--max-bad", "0.5"]
    for overwrite in ([], ["--overwrite"]):
        assert main([*command, *overwrite]) == 0
        assert open_set(out).classes == (odd, "tea")
        assert verify(out).ok
    assert "bad caf\\udce9.jpg: not a picture" in capsys.readouterr().out
    assert main(["stats", str(out)]) == 0
    assert "caf\\udce9" in capsys.readouterr().out
    # The manifest is UTF-8 all the same.
    manifest = out.with_suffix(".json") if out.is_file() else out / "set.json"
    manifest.read_text(encoding="utf-8")


def test_a_set_with_the_manifest_of_another_is_an_error(tmp_path: Path) -> None:
    """Both have the same numbers of images and bytes."""
    old, _ = sources(tmp_path)
    out = tmp_path / "set.beton"
    make(old, out)
    manifest = out.with_suffix(".json")
    manifest.write_text(manifest.read_text().replace(open_beton(out).sha256, "0" * 64))
    with pytest.raises(ValueError, match=r"of the hash \w+…, its manifest says 0000\w+…: one of the two"):
        matching_manifest(open_beton(out))


# ------------------------------------------------------------------------------------------------------------
# Other processes


def test_a_lock_belongs_to_the_file_that_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that starts while another one renames its file must not get the finished file."""
    partial, final = tmp_path / "x.partial", tmp_path / "x"
    first = disk.open_exclusive(partial)
    first.write(b"finished")
    flock = fcntl.flock

    def meanwhile(descriptor: int, operation: int) -> None:
        if partial.exists() and not final.exists():
            first.flush()
            partial.replace(final)
            first.close()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with disk.open_exclusive(partial) as second:
        second.write(b"second")
    assert final.read_bytes() == b"finished"
    assert partial.read_bytes() == b"second"


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "set.beton.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        BetonWriter(tmp_path / "set.beton", capacity=1)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_one_process_replaces_at_a_time(name: str, tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    out = tmp_path / name
    make(old, out)
    before = facts(out)

    class Meddled(FolderSource):
        def read(self, index: int) -> Any:
            with pytest.raises(FileExistsError, match=rf"another process is writing {out}"):
                make(new, out)
            return super().read(index)

    make(Meddled(tmp_path / "new"), out)
    assert facts(out) != before and verify(out).ok


def test_shards_that_are_being_made_are_not_replaced(tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    out = tmp_path / "set.shards"

    class Meddled(FolderSource):
        def read(self, index: int) -> Any:
            with pytest.raises(FileExistsError, match=rf"another process is writing {out}"):
                make(new, out)
            # Another machine makes its share.
            make_shards(Work(old, Normalising(), 0.5), out, Sharding(2, 0, (2, 3)))
            return super().read(index)

    made = make_shards(Work(Meddled(tmp_path / "old"), Normalising(), 0.5), out, Sharding(2, 0, (0, 1)))
    assert made.made == 1
    make(new, out)
    assert facts(out)[2] == ("cow", "dog", "elk") and verify(out).ok
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_a_first_set_is_not_replaced_while_it_is_made(tmp_path: Path) -> None:
    """The folder existed, empty, when both started."""
    old, _ = sources(tmp_path)
    out = tmp_path / "set.shards"
    out.mkdir()

    class Meddled(FolderSource):
        def read(self, index: int) -> Any:
            for overwrite in (False, True):
                with pytest.raises(FileExistsError, match=rf"another process is writing {out}"):
                    convert(old, out, max_bad=0.5, sharding=Sharding(2), overwrite=overwrite)
            return super().read(index)

    make(Meddled(tmp_path / "new"), out)
    assert facts(out)[2] == ("cow", "dog", "elk") and verify(out).ok


def test_a_failed_attempt_leaves_nothing(tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    out = tmp_path / "set.shards"
    make(old, out)
    (tmp_path / "new" / "elk" / "new5.jpg").write_bytes(b"bad")
    with pytest.raises(ValueError, match="1 of 6 images"):
        convert(new, out, sharding=Sharding(2), overwrite=True, max_bad=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "old", "set.shards"]
    for file in (tmp_path / "new").rglob("*.jpg"):
        file.write_bytes(encode(50, 50))
    convert(new, out, sharding=Sharding(2), overwrite=True, max_bad=0)
    assert facts(out)[0] == [encode(50, 50)] * 6


def test_a_folder_in_place_of_a_set_that_was_set_aside_is_an_error(tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    out = tmp_path / "set.shards"
    make(old, out)
    before = facts(out)
    out.rename(set_aside_path(out))
    with pytest.raises(FileNotFoundError, match=rf"its set lies in {set_aside_path(out)}: rename"):
        open_shards(out)
    out.mkdir()
    (out / "notes").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=rf"the old set is in {set_aside_path(out)}"):
            convert(new, out, sharding=Sharding(2), overwrite=overwrite)
    assert facts(set_aside_path(out)) == before and (out / "notes").read_text() == "mine"


def test_a_link_is_followed_and_modes_are_kept(tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    disk_of_its_own = tmp_path / "disk"
    disk_of_its_own.mkdir()
    link = tmp_path / "set.shards"
    link.symlink_to(disk_of_its_own / "set")
    (disk_of_its_own / "set").mkdir()
    make(old, link)
    (disk_of_its_own / "set").chmod(0o2775)
    make(new, link)
    assert link.is_symlink() and facts(link)[2] == ("cow", "dog", "elk")
    assert (disk_of_its_own / "set").stat().st_mode & 0o7777 == 0o2775
    assert [file.name for file in disk_of_its_own.iterdir()] == ["set"]
    (disk_of_its_own / "set").rename(set_aside_path(disk_of_its_own / "set"))
    make(old, link)
    assert facts(link)[2] == ("ant", "bee")


def test_a_file_in_place_of_a_set_is_an_error_before_the_work(tmp_path: Path) -> None:
    _, new = sources(tmp_path)
    (tmp_path / "set.shards").write_text("mine")
    with pytest.raises(FileExistsError, match=r"set\.shards is a file"):
        make(new, tmp_path / "set.shards")
    assert (tmp_path / "set.shards").read_text() == "mine"


def test_files_of_the_user_are_kept(tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    out = tmp_path / "set.shards"
    make(old, out)
    (out / "README").write_text("mine")
    (out / "more").mkdir()
    (tmp_path / "set.shards.old").mkdir()
    (tmp_path / "set.shards.old" / "000000.tar").write_text("a copy of mine")
    make(new, out)
    assert (out / "README").read_text() == "mine" and (out / "more").is_dir()
    assert (tmp_path / "set.shards.old" / "000000.tar").read_text() == "a copy of mine"
    assert verify(out).ok
