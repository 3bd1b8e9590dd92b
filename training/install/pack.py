"""Write archives that let the programs run on a machine with torch and without a network.

    python -m training.install.pack --out dist/pack --python 3.12

The archives hold the tracked files as they are on disk, the wheels that a machine with torch, torchvision,
numpy and numba may lack, and libturbojpeg; --dali adds DALI in archives of its own. Unpack them into one
folder and ``source activate`` there, then every program runs; see ``training/install/activate.py``.
Downloads are cached, so a second run needs no network.
"""

import gzip
import hashlib
import io
import json
import platform
import re
import stat
import subprocess
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.progress import Progress

from training import cli
from training.cli import console
from training.files import file_sha256, write_atomically
from training.install.activate import FOLDER, canonical, check_turbojpeg
from training.install.downloads import Wheel, debian_turbojpeg, resolve, trim

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
FOR_TESTS = ("webdataset", "simplejpeg", "pytest", "pytest-timeout", "hypothesis")
"""Packages of the extras that the tests and the loader's benchmark need in addition."""
_LIST_BYTES = 256 * 1024
"""Space in an archive for the list of wheels."""
_OVERHEAD = 1.002
"""Factor for the bytes that tar and gzip add."""


@dataclass(frozen=True)
class Pack:
    """Write archives for machines with torch and without a network."""

    out: Path = Path("dist/pack")
    """Folder of the archives; those of an earlier pack there are replaced."""
    python: str = "3.12"
    """Python version of those machines, such as 3.12."""
    dali: bool = False
    """Pack DALI too, some 150 MB."""
    turbojpeg: Path | None = None
    """A libturbojpeg.so to pack; by default apt-get downloads Debian's."""
    cache: Path = Path("data/pack-cache")
    """Folder where downloads are kept."""
    limit_mib: float = 60
    """Largest size of an archive in MiB."""

    @property
    def limit(self) -> int:
        """Largest size of an archive in bytes."""
        return int(self.limit_mib * MIB)


@dataclass(frozen=True)
class Piece:
    """A file of an archive, or a part of one."""

    name: str
    source: Path
    offset: int = 0
    size: int = -1
    """Bytes from ``offset`` on; −1 for a whole file."""

    @property
    def stored_size(self) -> int:
        """Upper bound of its bytes in a tar."""
        size = self.source.lstat().st_size if self.size < 0 else self.size
        return size + 4 * tarfile.BLOCKSIZE

    def read(self) -> bytes:
        """Read its content."""
        with self.source.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Group:
    """Packages that are packed together: the programs and what they need, or DALI."""

    prefix: str
    """Of the archive's number in its name."""
    list_name: str
    """The JSON file in each archive that lists the group's packages."""
    needs: Sequence[str]
    """Requirements that must be met on the other machine."""
    wheels: Sequence[Wheel]
    libraries: Sequence[Piece] = ()
    files: Sequence[Piece] = ()
    """Files that are not listed."""


def main(config: Pack) -> list[Path]:
    """Write the archives and SHA256SUMS; returns the paths of the archives.

    Raises:
        ValueError: if an option is out of range, a download fails, or a file does not match its hash.
    """
    _check(config)
    with console.status("resolving"):
        groups = _plan(config)
    archives = [path for group in groups for path in _write_group(config, group)]
    lines = "".join(f"{file_sha256(path)}  {path.name}\n" for path in archives)
    write_atomically(config.out / "SHA256SUMS", lambda file: file.write(lines.encode()))
    for stale in set(config.out.glob("maskmix-*.tar.gz")) - set(archives):
        stale.unlink()
    sizes = ", ".join(f"{path.name} {path.stat().st_size / MIB:.1f} MiB" for path in archives)
    console.print(f"{config.out}: {sizes}, SHA256SUMS")
    console.print(
        "next: copy them to the machine and, in their folder, run\n    sha256sum --quiet -c SHA256SUMS && "
        "mkdir -p maskmix && cat maskmix-*.tar.gz | tar -xzi -C maskmix && source maskmix/activate"
    )
    return archives


def _check(config: Pack) -> None:
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    supported = Requirement(f"python{lowest}").specifier
    if not re.fullmatch(r"3\.\d+", config.python) or not supported.contains(config.python):
        raise ValueError(f"--python is {config.python!r}; give a version {lowest}, such as 3.12")
    if platform.system() != "Linux":
        raise ValueError(f"this system is {platform.system()}, and packs are for Linux; make them on Linux")
    if not config.limit_mib >= 1:
        raise ValueError(f"--limit-mib is {config.limit_mib}; an archive needs at least 1 MiB")


# ======================================================================================================
# What is packed
# ======================================================================================================


def _plan(config: Pack) -> list[Group]:
    """Download everything, and list what goes into the archives."""
    needs, for_tests, for_dali = requirements()
    target = config.python, ROOT / "constraints.txt", config.cache
    wheels = resolve([*needs, *for_tests], *target)
    library = config.turbojpeg or debian_turbojpeg(config.cache)
    check_turbojpeg(str(library.absolute()), "give another --turbojpeg")
    script = (ROOT / "training/install/activate.sh").read_text().replace("@PYTHON@", config.python)
    activate = config.cache / f"activate-{config.python}"
    write_atomically(activate, lambda file: file.write(script.encode()))
    libraries = [Piece(f"{FOLDER}/{library.name}", library.resolve())]
    files = [Piece("activate", activate), *tracked(config.limit)]
    groups = [Group("", f"{FOLDER}/1-programs.json", needs, wheels, libraries, files)]
    if config.dali:
        packed = {wheel.name for wheel in wheels}
        with_dali = resolve([*needs, *for_tests, *for_dali], *target)
        more = [wheel for wheel in with_dali if wheel.name not in packed]
        groups.append(Group("dali-", f"{FOLDER}/2-dali.json", for_dali, more))
    return groups


def requirements() -> tuple[list[str], list[str], list[str]]:
    """Requirements of the programs, of their tests in addition, and of DALI, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = {canonical(Requirement(text).name): text for texts in extras.values() for text in texts}
    return project["dependencies"], [optional[name] for name in FOR_TESTS], extras["dali"]


def tracked(limit: int) -> list[Piece]:
    """The files that git tracks, as they are on disk. Raises ValueError if one is larger than an archive."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"git cannot list the files in {ROOT} ({error}); run this in a clone") from error
    paths = [path for name in listed.split(b"\0") if name and (path := ROOT / name.decode()).exists()]
    for path in paths:
        if path.stat().st_size > limit - _LIST_BYTES:
            size = path.stat().st_size / MIB
            raise ValueError(f"{path} is {size:.0f} MiB, more than an archive holds; raise --limit-mib")
    return [Piece(str(path.relative_to(ROOT)), path) for path in paths]


# ======================================================================================================
# Archives
# ======================================================================================================


def split(name: str, source: Path, limit: int) -> list[Piece]:
    """Split a file into pieces of at most ``limit`` bytes; a file within the limit stays whole."""
    size = source.stat().st_size
    if size <= limit:
        return [Piece(name, source)]
    return [
        Piece(f"{name}.{number:03}", source, start, min(limit, size - start))
        for number, start in enumerate(range(0, size, limit))
    ]


def fill(pieces: Iterable[Piece], limit: int) -> list[list[Piece]]:
    """Distribute pieces over archives of at most ``limit`` bytes, each to the first with enough room."""
    archives: list[list[Piece]] = []
    room: list[int] = []
    capacity = int(limit / _OVERHEAD) - _LIST_BYTES
    for piece in pieces:
        for number, free in enumerate(room):
            if piece.stored_size <= free:
                archives[number].append(piece)
                room[number] -= piece.stored_size
                break
        else:
            archives.append([piece])
            room.append(capacity - piece.stored_size)
    return archives


def _write_group(config: Pack, group: Group) -> list[Path]:
    """Write the archives of a group; each holds the list of all of the group's packages."""
    pieces = {
        wheel.name: split(
            f"{FOLDER}/{wheel.file}",
            trim(config.cache / wheel.file, config.python, config.cache),
            config.limit // 4,
        )
        for wheel in group.wheels
    }
    largest_first = sorted((p for parts in pieces.values() for p in parts), key=lambda p: -p.stored_size)
    archives = fill([*group.files, *group.libraries, *largest_first], config.limit)
    names = [f"maskmix-py{config.python}-{group.prefix}{n}.tar.gz" for n in range(1, len(archives) + 1)]
    archive_of = {
        piece.name: name for name, archive in zip(names, archives, strict=True) for piece in archive
    }
    listing = json.dumps(_listing(group, pieces, archive_of), indent=1).encode()
    total = sum(piece.stored_size for archive in archives for piece in archive)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("writing", total=total)
        for name, archive in zip(names, archives, strict=True):
            path = config.out / name
            _write_archive(path, archive, group.list_name, listing, lambda n: progress.advance(bar, n))
            size = path.stat().st_size
            assert size <= config.limit, f"{path} has {size} bytes"
    return [config.out / name for name in names]


def _listing(
    group: Group, pieces: dict[str, list[Piece]], archive_of: dict[str, str]
) -> dict[str, str | list[str] | dict[str, Any]]:
    """The list that ``source activate`` reads: what is needed, and each piece with its archive and hash."""

    def described(parts: Iterable[Piece]) -> dict[str, dict[str, str]]:
        return {
            part.name: {
                "archive": archive_of[part.name],
                "sha256": hashlib.sha256(part.read()).hexdigest(),
            }
            for part in parts
        }

    return {
        "machine": platform.machine(),
        "needs": list(group.needs),
        "libraries": described(group.libraries),
        "wheels": {
            wheel.name: {
                "version": wheel.version,
                "requires": wheel.requires,
                "pieces": described(pieces[wheel.name]),
            }
            for wheel in group.wheels
        },
    }


def _write_archive(
    path: Path, pieces: Iterable[Piece], list_name: str, listing: bytes, advance: Callable[[int], object]
) -> None:
    def write(file: Any) -> None:
        with (
            gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=3, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for piece in pieces:
                info = tarfile.TarInfo(piece.name)
                status = piece.source.lstat()
                info.mtime, info.mode = int(status.st_mtime), stat.S_IMODE(status.st_mode) | 0o444
                if piece.source.is_symlink():
                    info.type, info.linkname = tarfile.SYMTYPE, str(piece.source.readlink())
                    tar.addfile(info)
                else:
                    content = piece.read()
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                advance(piece.stored_size)
            info = tarfile.TarInfo(list_name)
            info.size, info.mtime = len(listing), int(time.time())
            tar.addfile(info, io.BytesIO(listing))

    write_atomically(path, write)


if __name__ == "__main__":
    cli.program(Pack, main, __doc__)
