"""Downloads for a pack: the wheels that another machine lacks, and libturbojpeg.

pip resolves for another Python than the one it runs in; its answers and all downloads are cached.
"""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.requirements import Requirement

from training.files import file_sha256, write_atomically
from training.install.activate import canonical

MACHINES_OWN = frozenset({"torch", "torchvision", "numpy", "numba", "llvmlite"})
"""Never packed: the machine has them, and a second copy might not fit its drivers or each other."""
GLIBC_MINORS = (28, 27, 26, 24, 17, 12, 5)
"""Wheels for these versions 2.x of glibc are accepted."""


@dataclass(frozen=True)
class Wheel:
    """A wheel to be packed."""

    name: str
    """As `canonical` spells it."""
    version: str
    file: str
    """Its name in the cache."""
    sha256: str
    """Hash from the package index; empty if it gives none."""
    requires: Sequence[str]
    """Its requirements on the other machine, without markers."""


# ======================================================================================================
# Wheels
# ======================================================================================================


def resolve(requirements: Sequence[str], python: str, constraints: Path, cache: Path) -> list[Wheel]:
    """Resolve and download the wheels for another Python, without `MACHINES_OWN`.

    The answer is cached, so repeating the call needs no network.

    Args:
        requirements: what to install, such as ``rich>=13``.
        python: version of the other Python, such as 3.12.
        constraints: pip's constraints file.
        cache: folder of the wheels and of cached answers.

    Raises:
        ValueError: if a package has no wheel, the index cannot be reached, or a file has a wrong hash.
    """
    question = json.dumps([python, platform.machine(), *requirements, constraints.read_text()])
    plan = cache / f"plan-{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if plan.is_file():
        wheels = [Wheel(**row) for row in json.loads(plan.read_text())]
    else:
        wheels = _resolve_with_pip(requirements, python, constraints)
    download(wheels, python, cache)
    if not plan.is_file():
        text = json.dumps([asdict(wheel) for wheel in wheels], indent=1)
        write_atomically(plan, lambda file: file.write(text.encode()))
    return wheels


def _resolve_with_pip(requirements: Sequence[str], python: str, constraints: Path) -> list[Wheel]:
    pending = [text for text in requirements if canonical(Requirement(text).name) not in MACHINES_OWN]
    while True:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            options = ("--dry-run", "--ignore-installed", "--report", str(report), "--target", folder)
            _run_pip(python, "install", *options, "--constraint", str(constraints), *pending)
            items = json.loads(report.read_text())["install"]
        wheels = [from_report(item, python) for item in items]
        # pip evaluates markers for the Python that runs it, so requirements of the other one may be missing.
        names = {wheel.name for wheel in wheels} | MACHINES_OWN
        required = {text for wheel in wheels for text in wheel.requires}
        missing = sorted(text for text in required if canonical(Requirement(text).name) not in names)
        if not missing:
            return [wheel for wheel in wheels if wheel.name not in MACHINES_OWN]
        pending += missing


def from_report(item: dict[str, Any], python: str) -> Wheel:
    """Build a wheel from an item of pip's installation report."""
    metadata, source = item["metadata"], item["download_info"]
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    requires = []
    for requirement in map(Requirement, metadata.get("requires_dist", ())):
        if requirement.marker is None or requirement.marker.evaluate(target):
            requirement.marker = None
            requires.append(str(requirement))
    return Wheel(
        name=canonical(metadata["name"]),
        version=metadata["version"],
        file=unquote(source["url"].rsplit("/", 1)[1]),
        sha256=source["archive_info"].get("hashes", {}).get("sha256", ""),
        requires=tuple(requires),
    )


def download(wheels: Iterable[Wheel], python: str, cache: Path) -> None:
    """Download what the cache lacks. Raises ValueError if a file there has another hash."""
    absent = [wheel for wheel in wheels if not (cache / wheel.file).is_file()]
    if absent:
        cache.mkdir(parents=True, exist_ok=True)
        names = [f"{wheel.name}=={wheel.version}" for wheel in absent]
        _run_pip(python, "download", "--no-deps", "--dest", str(cache), *names)
    for wheel in wheels:
        if wheel.sha256 and file_sha256(cache / wheel.file) != wheel.sha256:
            raise ValueError(
                f"{cache / wheel.file} does not have the hash that the package index gives, "
                f"{wheel.sha256}; delete it, and run this again"
            )


def _run_pip(python: str, command: str, *arguments: str) -> None:
    """Run pip for another Python. Raises ValueError with one sentence if it fails."""
    machine = platform.machine()
    tags = [f"manylinux{kind}_{machine}" for kind in (*(f"_2_{n}" for n in GLIBC_MINORS), 2014, 2010, 1)]
    quiet = ("--progress-bar", "off", "--retries", "1")
    target = ("--only-binary=:all:", "--python-version", python, "--implementation", "cp")
    platforms = [part for tag in (*tags, f"linux_{machine}") for part in ("--platform", tag)]
    ended = subprocess.run(
        [sys.executable, "-m", "pip", command, *quiet, *target, *platforms, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode == 0:
        return
    if "after connection broken by" in ended.stderr:
        raise ValueError(
            "the package index cannot be reached; make the pack on a machine with a network, or set "
            "PIP_INDEX_URL to an index that can be reached from here"
        )
    # pip words it differently for a package that constraints.txt pins.
    reasons = (r"The user requested \(constraint\) (\S+)", r"No matching distribution found for (\S+)")
    if found := re.search("|".join(reasons), ended.stdout + ended.stderr):
        raise ValueError(
            f"there is no wheel of {found[1] or found[2]} for Python {python} on Linux {machine}; choose "
            "another Python, or another version of the package in constraints.txt"
        )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [ended.stderr.strip()]
    raise ValueError(f"pip {command} failed: {lines[0].removeprefix('ERROR: ')}")


def trim(wheel: Path, python: str, cache: Path) -> Path:
    """Remove from an NVIDIA wheel what the other machine does not need; other wheels stay as they are.

    Extension modules for other Pythons, static libraries and headers are removed. The machine code for every
    kind of GPU stays.

    Returns:
        The smaller wheel in the cache, or ``wheel`` where nothing is removed.
    """
    if not wheel.name.startswith("nvidia_"):
        return wheel
    trimmed = cache / f"for-{python}" / wheel.name
    if trimmed.is_file():
        return trimmed
    with zipfile.ZipFile(wheel) as whole:
        kept = [member for member in whole.infolist() if _is_kept(member.filename, python)]
        if len(kept) == len(whole.infolist()):
            return wheel

        def write(file: Any) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
                for member in kept:
                    target.writestr(member, whole.read(member), zipfile.ZIP_DEFLATED)

        write_atomically(trimmed, write)
    return trimmed


def _is_kept(name: str, python: str) -> bool:
    other = re.search(r"\.cpython-(\d+t?)-", name)
    if other and other[1] != python.replace(".", ""):
        return False
    return not name.endswith(".a") and "/include/" not in name


# ======================================================================================================
# libturbojpeg
# ======================================================================================================


def debian_turbojpeg(cache: Path) -> Path:
    """Download Debian's libturbojpeg, which needs glibc 2.14.

    Raises:
        ValueError: if apt-get is not installed or fails.
    """
    folder = (cache / f"turbojpeg-{platform.machine()}").absolute()
    if found := sorted(folder.glob("usr/lib/*/libturbojpeg.so.0.*")):
        return found[0]
    alternative = "name a local library by --turbojpeg, such as /usr/lib/x86_64-linux-gnu/libturbojpeg.so.0"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ValueError(f"apt-get, which downloads libturbojpeg0, is not installed here; {alternative}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        # A relative path: apt-get's own user may not have access to this folder.
        ended = subprocess.run(
            ["apt-get", "download", "libturbojpeg0"], cwd=partial, capture_output=True, text=True, check=False
        )
        packages = list(Path(partial).glob("*.deb"))
        if ended.returncode or not packages:
            reason = (ended.stderr.strip().splitlines() or ["it gave no file"])[-1].removeprefix("E: ")
            raise ValueError(
                f"apt-get download libturbojpeg0 failed ({reason}); run apt-get update, or {alternative}"
            )
        subprocess.run(["dpkg-deb", "-x", packages[0], f"{partial}/unpacked"], check=True)
        (Path(partial) / "unpacked").rename(folder)
    return debian_turbojpeg(cache)
