"""The wheels that another machine lacks: which they are, and their download.

pip answers for another Python than the one it runs in; its answers and its downloads are kept.
"""

import hashlib
import json
import platform
import re
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

from training.files import write_atomically
from training.install.activate import canonical

MACHINES_OWN = frozenset({"torch", "torchvision", "numpy", "numba", "llvmlite"})
"""Never packed: the machine has them, and a second copy would not fit its drivers or each other."""
GLIBC = (28, 27, 26, 24, 17, 12, 5)
"""Wheels for glibc 2.28 and older are taken."""


@dataclass(frozen=True)
class Wheel:
    """A wheel to be packed."""

    name: str
    """As `canonical` spells it."""
    version: str
    file: str
    """Its name in the cache."""
    sha256: str
    """As the package index gives it."""
    requires: Sequence[str]
    """What it needs on the machines, without markers."""


def resolve(wanted: Sequence[str], python: str, constraints: Path, cache: Path) -> list[Wheel]:
    """The wheels that ``wanted`` needs for another Python, without `MACHINES_OWN`; all are in ``cache`` then.

    What pip answers is kept, so the same question is answered without a network from the second time on.
    Raises ValueError for a package without a wheel, for an index out of reach, and for a wrong hash.
    """
    question = json.dumps([python, platform.machine(), *wanted, constraints.read_text()])
    plan = cache / f"plan-{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if plan.is_file():
        wheels = [Wheel(**row) for row in json.loads(plan.read_text())]
    else:
        wheels = _ask_pip(wanted, python, constraints)
    download(wheels, python, cache)
    if not plan.is_file():
        text = json.dumps([asdict(wheel) for wheel in wheels], indent=1)
        write_atomically(plan, lambda file: file.write(text.encode()))
    return wheels


def _ask_pip(wanted: Sequence[str], python: str, constraints: Path) -> list[Wheel]:
    asked = [text for text in wanted if canonical(Requirement(text).name) not in MACHINES_OWN]
    while True:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            options = ("--dry-run", "--ignore-installed", "--report", str(report), "--target", folder)
            _pip(python, "install", *options, "--constraint", str(constraints), *asked)
            items = json.loads(report.read_text())["install"]
        wheels = [from_report(item, python) for item in items]
        # pip evaluates markers for the Python that runs it, not for the one it is asked about.
        names = {wheel.name for wheel in wheels} | MACHINES_OWN
        needed = {text for wheel in wheels for text in wheel.requires}
        lacking = sorted(text for text in needed if canonical(Requirement(text).name) not in names)
        if not lacking:
            return [wheel for wheel in wheels if wheel.name not in MACHINES_OWN]
        asked += lacking


def from_report(item: dict[str, Any], python: str) -> Wheel:
    """A wheel, of an item of pip's report."""
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
    """Have pip fetch what is not in the cache; raises ValueError for a file there with another hash."""
    absent = [wheel for wheel in wheels if not (cache / wheel.file).is_file()]
    if absent:
        cache.mkdir(parents=True, exist_ok=True)
        names = [f"{wheel.name}=={wheel.version}" for wheel in absent]
        _pip(python, "download", "--no-deps", "--dest", str(cache), *names)
    for wheel in wheels:
        if wheel.sha256 and sha256(cache / wheel.file) != wheel.sha256:
            raise ValueError(
                f"{cache / wheel.file} does not have the hash that the package index gives, "
                f"{wheel.sha256}; delete it, and run this again"
            )


def _pip(python: str, command: str, *arguments: str) -> None:
    """Run pip for another Python; what goes wrong becomes one sentence."""
    machine = platform.machine()
    tags = [f"manylinux{kind}_{machine}" for kind in (*(f"_2_{minor}" for minor in GLIBC), 2014, 2010, 1)]
    quick = ("--progress-bar", "off", "--retries", "1")
    target = ("--only-binary=:all:", "--python-version", python, "--implementation", "cp")
    platforms = [part for tag in (*tags, f"linux_{machine}") for part in ("--platform", tag)]
    ended = subprocess.run(
        [sys.executable, "-m", "pip", command, *quick, *target, *platforms, *arguments],
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
    # The first is of a package that constraints.txt pins.
    reasons = (r"The user requested \(constraint\) (\S+)", r"No matching distribution found for (\S+)")
    if found := re.search("|".join(reasons), ended.stdout + ended.stderr):
        raise ValueError(
            f"there is no wheel of {found[1] or found[2]} for Python {python} on Linux {machine}; choose "
            "another Python, or another version of the package in constraints.txt"
        )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [ended.stderr.strip()]
    raise ValueError(f"pip {command} failed: {lines[0].removeprefix('ERROR: ')}")


def trimmed(wheel: Path, python: str, cache: Path) -> Path:
    """A wheel of NVIDIA's without what other Pythons and compilers need; any other as it is.

    Left out are extension modules for other Pythons, static libraries and headers. The machine code for each
    kind of GPU stays.
    """
    if not wheel.name.startswith("nvidia_"):
        return wheel
    lean = cache / f"for-{python}" / wheel.name
    if lean.is_file():
        return lean
    with zipfile.ZipFile(wheel) as whole:
        kept = [member for member in whole.infolist() if _is_kept(member.filename, python)]
        if len(kept) == len(whole.infolist()):
            return wheel

        def write(file: Any) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
                for member in kept:
                    target.writestr(member, whole.read(member), zipfile.ZIP_DEFLATED)

        write_atomically(lean, write)
    return lean


def _is_kept(name: str, python: str) -> bool:
    other = re.search(r"\.cpython-(\d+t?)-", name)
    if other and other[1] != python.replace(".", ""):
        return False
    return not name.endswith(".a") and "/include/" not in name


def sha256(path: Path) -> str:
    """The hash of a file, as sha256sum writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
