"""What ``source activate`` does in a folder where archives of ``training.install.pack`` were unpacked.

The machine's own Python runs this file, by its standard library alone. It adds only those packages of the
pack that this Python does not have, in a folder of their own that PYTHONPATH names. So nothing that the
machine has is replaced, and its torch keeps its own NumPy. The shell evaluates the lines printed.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "packed"
"""Where the pack's own files lie, below the folder that the archives are unpacked into."""
_DALI_OPENS = ("cufft", "cufile", "nvcomp", "nvjpeg", "nvjpeg2k", "nvtiff", "npp*")
"""Libraries of CUDA that DALI opens by name."""
_NAMESPACE = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"


class PackError(Exception):
    """The pack cannot be used here; the message says why and what to do."""


def canonical(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(path: list[str]) -> dict[str, str]:
    """Canonical name → version of the distributions on ``path``; the first of a name is the one in use."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=path):
        if "Name" in distribution.metadata:  # what is left of an aborted installation has none
            found.setdefault(canonical(distribution.metadata["Name"]), distribution.version)
    return found


def check(needs: list[str], have: Mapping[str, str], hint: str) -> None:
    """Raise PackError for the first requirement that is not met."""
    from packaging.requirements import Requirement  # the machine's, or out of the pack

    for need in map(Requirement, needs):
        version = have.get(canonical(need.name))
        if version is None:
            raise PackError(f"{need.name} is not installed for {sys.executable}; {hint}")
        if not need.specifier.contains(version, prereleases=True):
            raise PackError(f"{need.name} {version} is installed for {sys.executable}, not {need}; {hint}")


def join(root: Path, pieces: Mapping[str, Mapping[str, str]], target: Path) -> None:
    """Write the pieces of one file after each other into ``target``, each held against its hash."""
    with target.open("wb") as file:
        for name, piece in pieces.items():
            file.write(_checked(root, name, piece))


def _checked(root: Path, name: str, piece: Mapping[str, str]) -> bytes:
    if not (root / name).is_file():
        raise PackError(f"{root / name} is not there; unpack {piece['archive']} into {root} too")
    content = (root / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != piece["sha256"]:
        raise PackError(
            f"{root / name} does not match its hash; copy {piece['archive']} here again, and unpack it "
            f"into {root} again"
        )
    return content


def unpack(root: Path, wheels: Mapping[str, Mapping[str, Any]]) -> Path:
    """The folder that holds these wheels' packages; it is made if it is not there yet.

    Its name is a hash of its content, so machines that share the folder but lack different packages do not
    disturb each other. It appears complete, or not at all.
    """
    hashes = sorted(piece["sha256"] for wheel in wheels.values() for piece in wheel["pieces"].values())
    site = root / FOLDER / f"site-{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:12]}"
    if site.is_dir():
        return site
    partial = site.with_name(f".{site.name}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        for name, wheel in wheels.items():
            whole = partial / f"{name}.whl"
            join(root, wheel["pieces"], whole)
            _unzip(whole, partial)
            whole.unlink()
        # Some wheels make `nvidia` a regular package, which would hide either the machine's part or ours.
        if (partial / "nvidia").is_dir():
            (partial / "nvidia/__init__.py").write_text(_NAMESPACE)
        try:
            partial.rename(site)
        except OSError:
            if not site.is_dir():  # or else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return site


def _unzip(wheel: Path, folder: Path) -> None:
    """Unpack a wheel's packages; scripts, headers and other data are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            first, _, rest = member.filename.partition("/")
            if first.endswith(".data"):
                kind, _, member.filename = rest.partition("/")
                if kind not in ("purelib", "platlib") or not member.filename:
                    continue
            file = Path(archive.extract(member, folder))
            if member.external_attr >> 16 & 0o100:
                file.chmod(0o755)


def _turbojpeg(root: Path, library: Mapping[str, Mapping[str, str]], own: tuple[str, str]) -> str:
    """The path of a libturbojpeg that works here: the user's if one is named already, or else the pack's."""
    path = os.environ.get("LIBTURBOJPEG", "")
    if not path or path.startswith(own[1]):
        for name, piece in library.items():
            _checked(root, name, piece)
            path = str(root / name)
    try:
        ctypes.CDLL(path).tjInitDecompress  # noqa: B018
    except (OSError, AttributeError) as error:
        raise PackError(
            f"{path} is no libturbojpeg that works here ({error}); export LIBTURBOJPEG with the path of one "
            "that does, and source activate again"
        ) from error
    return path


def environment(root: Path) -> tuple[dict[str, str], str]:
    """Variables to set, and a line about what is ready."""
    groups = [json.loads(file.read_text()) for file in sorted((root / FOLDER).glob("*.json"))]
    if not groups:
        raise PackError(f"{root / FOLDER} has no packages; unpack the archives of `make pack` into {root}")
    if platform.machine() != groups[0]["machine"]:
        raise PackError(f"this machine is {platform.machine()}, the pack is for {groups[0]['machine']}")
    own = (str(root), str(root / FOLDER))
    path = [entry for entry in sys.path if entry != own[0] and not entry.startswith(own[1])]
    present = installed(path)
    wheels = {name: wheel for group in groups for name, wheel in group["wheels"].items()}
    missing = {name: wheel for name, wheel in wheels.items() if name not in present}
    site = unpack(root, missing)
    sys.path.append(str(site))
    have = present | {name: wheel["version"] for name, wheel in missing.items()}
    check(
        [need for group in groups for need in group["needs"]],
        have,
        "install it, or activate the environment or load the module that has it, and source activate again",
    )
    for name, wheel in missing.items():
        try:
            check(wheel["requires"], have, f"{name} of the pack may not work")
        except PackError as error:
            sys.stderr.write(f"note: {error}\n")
    variables = {"PYTHONPATH": os.pathsep.join((own[0], *_paths("PYTHONPATH", own), str(site)))}
    variables["LIBTURBOJPEG"] = _turbojpeg(root, groups[0]["libraries"], own)
    if any(name.startswith("nvidia-dali") for name in wheels):
        # DALI looks for these in folders next to its own, where the machine's are not.
        globs = [f"nvidia/*/lib*/lib{name}.so*" for name in _DALI_OPENS]
        files = [file for at in (*path, str(site)) for glob in globs for file in sorted(Path(at).glob(glob))]
        folders = (*_paths("LD_LIBRARY_PATH", own), *(str(file.parent) for file in files))
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(dict.fromkeys(folders))
    versions = f"Python {platform.python_version()}, torch {have['torch']}, {len(missing)} packages added"
    return variables, f"{versions}; next: cd {shlex.quote(own[0])} && python3 train_pretrain.py --help"


def _paths(variable: str, own: tuple[str, str]) -> list[str]:
    """What a search path holds already, but for what an earlier activation put there."""
    entries = os.environ.get(variable, "").split(os.pathsep)
    return [entry for entry in entries if entry and entry != own[0] and not entry.startswith(own[1])]


def main(root: Path) -> int:
    """Print lines for the shell; the exit status."""
    try:
        variables, line = environment(root)
    except PackError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error}; unpack the archives into a folder that you may write to\n")
        return 2
    for name, value in variables.items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    sys.stdout.write(f"printf '%s\\n' {shlex.quote(line)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
