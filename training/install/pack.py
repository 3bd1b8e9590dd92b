"""Archives by which the programs run on a machine that has torch and no network.

    python -m training.install.pack --out dist/pack --python 3.12

They hold the tracked files as they are on disk, the wheels that a machine with torch, torchvision, numpy and
numba may lack, and libturbojpeg; with --dali also DALI, in archives of its own. Once they are unpacked into
one folder, ``source activate`` there makes every program run, see ``training/install/activate.py``.
Downloads are kept, and a second run needs no network.
"""

import ctypes
import gzip
import hashlib
import io
import json
import platform
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
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
from training.files import write_atomically
from training.install.activate import FOLDER, canonical
from training.install.wheels import Wheel, resolve, sha256, trimmed

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
FOR_TESTS = ("webdataset", "simplejpeg", "pytest", "pytest-timeout", "hypothesis")
"""Of the extras, what the tests and the loader's measurements need besides."""
# What an archive holds besides its members: the list of wheels, and tar's and gzip's own bytes.
_LIST_BYTES = 256 * 1024
_OVERHEAD = 1.002

_ACTIVATE = """\
# Source this file in bash: every program then runs under this machine's own Python and torch.
if [[ "${BASH_SOURCE[0]:-}" == "$0" ]]; then
    echo "error: $0 only sets variables; run: source $0" >&2
    exit 2
fi
_maskmix_root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd -P)"
_maskmix_python="$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo absent)"
if [[ "$_maskmix_python" != "@PYTHON@" ]]; then
    echo "error: the pack is for Python @PYTHON@, and python3 here is $_maskmix_python; activate an" \\
        "environment with Python @PYTHON@ and torch, or write another pack: make pack PYTHON=VERSION" >&2
    unset _maskmix_root _maskmix_python
    return 2
fi
_maskmix_lines="$(python3 -P "$_maskmix_root/training/install/activate.py")" || {
    unset _maskmix_root _maskmix_python _maskmix_lines
    return 2
}
eval "$_maskmix_lines"
unset _maskmix_root _maskmix_python _maskmix_lines
"""


@dataclass(frozen=True)
class Pack:
    """Write archives for machines with torch and without a network."""

    out: Path = Path("dist/pack")
    """Folder of the archives; those of an earlier pack there are replaced."""
    python: str = "3.12"
    """Python of those machines, such as 3.12."""
    dali: bool = False
    """Pack DALI too, some 150 MB."""
    turbojpeg: Path | None = None
    """A libturbojpeg.so to pack; by default Debian's is downloaded by apt-get."""
    cache: Path = Path("data/pack-cache")
    """Folder where downloads are kept."""
    limit_mib: float = 60
    """Largest size of an archive in MiB."""


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one, as it stands in an archive."""

    name: str
    source: Path
    offset: int = 0
    size: int = -1
    """Bytes from ``offset`` on; −1 for a whole file."""

    @property
    def stored(self) -> int:
        """Bytes it takes in a tar, and a few more."""
        size = self.source.lstat().st_size if self.size < 0 else self.size
        return size + 4 * tarfile.BLOCKSIZE

    def content(self) -> bytes:
        """Its bytes."""
        with self.source.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def main(config: Pack) -> list[Path]:
    """Write the archives and SHA256SUMS; returns the archives.

    Raises ValueError for a Python or a platform without wheels, for a download that cannot be made, and for
    one that does not match its hash.
    """
    _check(config)
    needs, for_tests, for_dali = requirements()
    wanted = [*needs, *for_tests]
    limit = int(config.limit_mib * MIB)
    where = config.python, ROOT / "constraints.txt", config.cache
    with console.status("resolving"):
        wheels = resolve(wanted, *where)
        library = config.turbojpeg or _debian_turbojpeg(config.cache)
        groups = [("", needs, wheels)]
        if config.dali:
            known = {wheel.name for wheel in wheels}
            more = [wheel for wheel in resolve([*wanted, *for_dali], *where) if wheel.name not in known]
            groups.append(("dali-", for_dali, more))
    check_turbojpeg(library)
    shell = config.cache / f"activate-{config.python}"
    write_atomically(shell, lambda file: file.write(_ACTIVATE.replace("@PYTHON@", config.python).encode()))

    archives: list[Path] = []
    for kind, needs, wheels in groups:
        loose = [] if kind else [Piece("activate", shell), *tracked(limit)]
        archives += _write_group(config, kind, needs, wheels, None if kind else library, loose)
    _write_sums(config.out, archives)
    for stale in set(config.out.glob("maskmix-*.tar.gz")) - set(archives):
        stale.unlink()
    sizes = ", ".join(f"{path.name} {path.stat().st_size / MIB:.1f} MiB" for path in archives)
    console.print(f"{config.out}: {sizes}, SHA256SUMS")
    console.print(
        "next: copy them to the machine and, where they lie, run\n    sha256sum --quiet -c SHA256SUMS && "
        "mkdir -p maskmix && cat maskmix-*.tar.gz | tar -xzi -C maskmix && source maskmix/activate"
    )
    return archives


def _check(config: Pack) -> None:
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    known = Requirement(f"python{lowest}").specifier
    if not re.fullmatch(r"3\.\d+", config.python) or not known.contains(config.python):
        raise ValueError(f"--python is {config.python!r}; give a version {lowest}, such as 3.12")
    if platform.system() != "Linux":
        raise ValueError(f"this system is {platform.system()}; make the pack on Linux, which it is for")
    if not config.limit_mib >= 1:
        raise ValueError(f"--limit-mib is {config.limit_mib}; an archive needs at least 1 MiB")


# ======================================================================================================
# What is packed
# ======================================================================================================


def requirements() -> tuple[list[str], list[str], list[str]]:
    """What the programs need, what their tests need besides, and DALI, all as pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = {canonical(Requirement(text).name): text for texts in extras.values() for text in texts}
    return project["dependencies"], [optional[name] for name in FOR_TESTS], extras["dali"]


def tracked(limit: int) -> list[Piece]:
    """The files that git knows, as they are on disk; none of them may be larger than an archive."""
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


def _debian_turbojpeg(cache: Path) -> Path:
    """Debian's library, out of its package; it needs no more than glibc 2.14."""
    folder = (cache / f"turbojpeg-{platform.machine()}").absolute()
    if found := sorted(folder.glob("usr/lib/*/libturbojpeg.so.0.*")):
        return found[0]
    by_hand = "name a local library by --turbojpeg, such as /usr/lib/x86_64-linux-gnu/libturbojpeg.so.0"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ValueError(f"apt-get, which downloads libturbojpeg0, is not installed here; {by_hand}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        # With a relative path apt-get's own user need not reach this folder.
        fetched = subprocess.run(
            ["apt-get", "download", "libturbojpeg0"], cwd=partial, capture_output=True, text=True, check=False
        )
        packages = list(Path(partial).glob("*.deb"))
        if fetched.returncode or not packages:
            reason = (fetched.stderr.strip().splitlines() or ["it gave no file"])[-1].removeprefix("E: ")
            raise ValueError(
                f"apt-get download libturbojpeg0 failed ({reason}); run apt-get update, or {by_hand}"
            )
        subprocess.run(["dpkg-deb", "-x", packages[0], f"{partial}/unpacked"], check=True)
        (Path(partial) / "unpacked").rename(folder)
    return _debian_turbojpeg(cache)


def check_turbojpeg(library: Path) -> None:
    """Raise ValueError for a file that is no libturbojpeg."""
    try:
        ctypes.CDLL(str(library.absolute())).tjInitDecompress  # noqa: B018
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"{library} is no libturbojpeg that can be loaded ({error}); give another --turbojpeg"
        ) from error


# ======================================================================================================
# Archives
# ======================================================================================================


def split(name: str, source: Path, limit: int) -> list[Piece]:
    """A file as pieces of at most ``limit`` bytes; as itself where it is no larger."""
    size = source.stat().st_size
    if size <= limit:
        return [Piece(name, source)]
    starts = range(0, size, limit)
    return [
        Piece(f"{name}.{number:03}", source, start, min(limit, size - start))
        for number, start in enumerate(starts)
    ]


def fill(pieces: Iterable[Piece], limit: int) -> list[list[Piece]]:
    """Archives of at most ``limit`` bytes: each piece goes into the first that has room for it."""
    archives: list[list[Piece]] = []
    room: list[int] = []
    capacity = int(limit / _OVERHEAD) - _LIST_BYTES
    for piece in pieces:
        for number, free in enumerate(room):
            if piece.stored <= free:
                archives[number].append(piece)
                room[number] -= piece.stored
                break
        else:
            archives.append([piece])
            room.append(capacity - piece.stored)
    return archives


def _write_group(
    config: Pack,
    kind: str,
    needs: Sequence[str],
    wheels: Sequence[Wheel],
    library: Path | None,
    loose: Sequence[Piece],
) -> list[Path]:
    """Write the archives of the programs or of DALI; each holds the list of all that the group has."""
    limit = int(config.limit_mib * MIB)
    pieces = {
        wheel.name: split(
            f"{FOLDER}/{wheel.file}",
            trimmed(config.cache / wheel.file, config.python, config.cache),
            limit // 4,
        )
        for wheel in wheels
    }
    libraries = [Piece(f"{FOLDER}/{library.name}", library.resolve())] if library else []
    largest_first = sorted((p for parts in pieces.values() for p in parts), key=lambda p: -p.stored)
    archives = fill([*loose, *libraries, *largest_first], limit)
    names = [f"maskmix-py{config.python}-{kind}{number + 1}.tar.gz" for number in range(len(archives))]
    where = {piece.name: name for name, archive in zip(names, archives, strict=True) for piece in archive}

    def described(parts: Iterable[Piece]) -> dict[str, dict[str, str]]:
        return {
            p.name: {"archive": where[p.name], "sha256": hashlib.sha256(p.content()).hexdigest()}
            for p in parts
        }

    content = {
        "machine": platform.machine(),
        "needs": list(needs),
        "libraries": described(libraries),
        "wheels": {
            wheel.name: {
                "version": wheel.version,
                "requires": wheel.requires,
                "pieces": described(pieces[wheel.name]),
            }
            for wheel in wheels
        },
    }
    listed = json.dumps(content, indent=1).encode()
    list_name = f"{FOLDER}/{'2-dali' if kind else '1-programs'}.json"
    paths = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("writing", total=sum(piece.stored for part in archives for piece in part))
        for name, archive in zip(names, archives, strict=True):
            paths.append(config.out / name)
            _write_archive(paths[-1], archive, list_name, listed, lambda size: progress.advance(bar, size))
            size = paths[-1].stat().st_size
            assert size <= limit, f"{paths[-1]} has {size} bytes"
    return paths


def _write_archive(
    path: Path, pieces: Iterable[Piece], list_name: str, listed: bytes, advance: Callable[[int], object]
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
                    content = piece.content()
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                advance(piece.stored)
            info = tarfile.TarInfo(list_name)
            info.size, info.mtime = len(listed), int(time.time())
            tar.addfile(info, io.BytesIO(listed))

    write_atomically(path, write)


def _write_sums(out: Path, archives: Iterable[Path]) -> None:
    """Write the hashes of the archives as sha256sum does."""
    lines = "".join(f"{sha256(path)}  {path.name}\n" for path in archives)
    write_atomically(out / "SHA256SUMS", lambda file: file.write(lines.encode()))


if __name__ == "__main__":
    cli.program(Pack, main, __doc__)
