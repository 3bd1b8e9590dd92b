"""The work of ``source activate`` in a folder where archives of ``training.install.pack`` were unpacked.

The machine's own Python runs this file, with the standard library alone. It unpacks only the packages that
this Python lacks, into a folder that it appends to PYTHONPATH. So nothing installed on the machine is
replaced, and its torch keeps its own NumPy. The shell evaluates the lines that are printed.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "packed"
"""Folder of the pack's own files, below the one into which the archives are unpacked."""
_DALI_LIBRARIES = ("cufft", "cufile", "nvcomp", "nvjpeg", "nvjpeg2k", "nvtiff", "npp*")
"""CUDA libraries that DALI opens by name."""
_NAMESPACE = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"


class PackError(ValueError):
    """The pack cannot be used here; the message says why and what to do."""


def main(root: Path) -> int:
    """Print lines for the shell; returns the exit status."""
    try:
        variables, summary = prepare_environment(root)
    except PackError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error}; unpack the archives into a folder with write permission\n")
        return 2
    for name, value in variables.items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    sys.stdout.write(f"printf '%s\\n' {shlex.quote(summary)}\n")
    return 0


def prepare_environment(root: Path) -> tuple[dict[str, str], str]:
    """Unpack what this machine lacks.

    Args:
        root: the folder into which the archives were unpacked.

    Returns:
        The environment variables to set, and a line that sums up what is ready.

    Raises:
        PackError: if the pack is incomplete or for another machine, or a package is missing or too old.
    """
    groups = [json.loads(file.read_text()) for file in sorted((root / FOLDER).glob("*.json"))]
    if not groups:
        raise PackError(f"{root / FOLDER} has no packages; unpack the archives of `make pack` into {root}")
    if platform.machine() != groups[0]["machine"]:
        raise PackError(f"this machine is {platform.machine()}, the pack is for {groups[0]['machine']}")
    path = [entry for entry in sys.path if not _is_ours(entry, root)]
    present = installed(path)
    wheels = {name: wheel for group in groups for name, wheel in group["wheels"].items()}
    missing = {name: wheel for name, wheel in wheels.items() if name not in present}
    site = unpack(root, missing)
    sys.path.append(str(site))  # the check below may need `packaging` from the pack
    versions = present | {name: wheel["version"] for name, wheel in missing.items()}
    _check_requirements(groups, missing, versions)
    variables = {
        "PYTHONPATH": os.pathsep.join((str(root), *_entries("PYTHONPATH", root), str(site))),
        "LIBTURBOJPEG": _turbojpeg(root, groups[0]["libraries"]),
    }
    if any(name.startswith("nvidia-dali") for name in wheels):
        folders = (*_entries("LD_LIBRARY_PATH", root), *_dali_folders([*path, str(site)]))
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(dict.fromkeys(folders))
    summary = f"Python {platform.python_version()}, torch {versions['torch']}, {len(missing)} packages added"
    return variables, f"{summary}; next: cd {shlex.quote(str(root))} && python3 train_pretrain.py --help"


def canonical(name: str) -> str:
    """Normalise a distribution's name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(path: list[str]) -> dict[str, str]:
    """Versions of the distributions on ``path`` by canonical name; the first of a name counts."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=path):
        if "Name" in distribution.metadata:  # the remains of an aborted installation have none
            found.setdefault(canonical(distribution.metadata["Name"]), distribution.version)
    return found


def check_turbojpeg(library: str, advice: str) -> None:
    """Raise PackError, ending with ``advice``, if a file is not a libturbojpeg that can be loaded."""
    try:
        ctypes.CDLL(library).tjInitDecompress  # noqa: B018
    except (OSError, AttributeError) as error:
        raise PackError(f"{library} is not a libturbojpeg that can be loaded ({error}); {advice}") from error


# ======================================================================================================
# Unpacking
# ======================================================================================================


def unpack(root: Path, wheels: Mapping[str, Mapping[str, Any]]) -> Path:
    """Return the folder with the packages of these wheels; unpack them if it does not exist.

    The folder is named by a hash of its content, so machines that share ``root`` but lack different packages
    do not interfere. It appears complete, or not at all.
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
            with whole.open("wb") as file:
                for piece_name, piece in wheel["pieces"].items():
                    file.write(_read_checked(root, piece_name, piece))
            _unzip(whole, partial)
            whole.unlink()
        # Some wheels make `nvidia` a regular package, which would hide the machine's part or ours.
        if (partial / "nvidia").is_dir():
            (partial / "nvidia/__init__.py").write_text(_NAMESPACE)
        try:
            partial.rename(site)
        except OSError:
            if not site.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return site


def _read_checked(root: Path, name: str, piece: Mapping[str, str]) -> bytes:
    """Read a piece of a file and compare it with its hash."""
    if not (root / name).is_file():
        raise PackError(f"{root / name} does not exist; unpack {piece['archive']} into {root} too")
    content = (root / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != piece["sha256"]:
        raise PackError(
            f"{root / name} does not match its hash; copy {piece['archive']} here again, and unpack it "
            f"into {root} again"
        )
    return content


def _unzip(wheel: Path, folder: Path) -> None:
    """Unpack a wheel's packages, without scripts, headers and other data."""
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


# ======================================================================================================
# The machine's packages and variables
# ======================================================================================================


def _check_requirements(
    groups: Sequence[Mapping[str, Any]],
    missing: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Raise PackError for a requirement of the programs that is not met; print a note for one of a wheel."""
    advice = (
        "install it, or activate the environment or load the module that has it, and source activate again"
    )
    for group in groups:
        _check_versions(group["needs"], versions, advice)
    for name, wheel in missing.items():
        try:
            _check_versions(wheel["requires"], versions, f"{name} of the pack may not work")
        except PackError as error:
            sys.stderr.write(f"note: {error}\n")


def _check_versions(requirements: Sequence[str], versions: Mapping[str, str], advice: str) -> None:
    """Raise PackError for the first requirement that is not met."""
    from packaging.requirements import Requirement  # the machine's, or the pack's

    for requirement in map(Requirement, requirements):
        version = versions.get(canonical(requirement.name))
        if version is None:
            raise PackError(f"{requirement.name} is not installed for {sys.executable}; {advice}")
        if not requirement.specifier.contains(version, prereleases=True):
            raise PackError(
                f"{requirement.name} {version} is installed for {sys.executable}, not {requirement}; {advice}"
            )


def _turbojpeg(root: Path, library: Mapping[str, Mapping[str, str]]) -> str:
    """The path of a libturbojpeg: the one in the user's LIBTURBOJPEG if that is set, or else the pack's."""
    path = os.environ.get("LIBTURBOJPEG", "")
    if not path or _is_ours(path, root):
        for name, piece in library.items():
            _read_checked(root, name, piece)
            path = str(root / name)
    check_turbojpeg(path, "export LIBTURBOJPEG with the path of one that can, and source activate again")
    return path


def _dali_folders(path: Sequence[str]) -> list[str]:
    """Folders of the CUDA libraries that DALI opens; it searches only folders next to its own."""
    patterns = [f"nvidia/*/lib*/lib{name}.so*" for name in _DALI_LIBRARIES]
    files = [file for at in path for pattern in patterns for file in sorted(Path(at).glob(pattern))]
    return [str(file.parent) for file in files]


def _entries(variable: str, root: Path) -> list[str]:
    """Entries of a search path, without those of an earlier activation."""
    entries = os.environ.get(variable, "").split(os.pathsep)
    return [entry for entry in entries if entry and not _is_ours(entry, root)]


def _is_ours(entry: str, root: Path) -> bool:
    return entry == str(root) or entry.startswith(str(root / FOLDER))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
