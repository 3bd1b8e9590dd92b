"""A machine that has torch but not our other requirements, for tests of packs."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from training.install.activate import canonical


def closure(roots: Iterable[str], without: Iterable[str] = ()) -> dict[str, importlib.metadata.Distribution]:
    """Distributions by name: the installed ``roots`` and all they require, except ``without``."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        name = canonical(requirement.name)
        if name in found or name in without:
            continue
        found[name] = importlib.metadata.distribution(name)
        for need in map(Requirement, found[name].requires or ()):
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(need)
    return found


def make_wheels(
    folder: Path, distributions: Iterable[importlib.metadata.Distribution], *, only_metadata: bool = False
) -> None:
    """Write installed packages as wheels for any Python, without their scripts."""
    for distribution in distributions:
        files = [f for f in distribution.files or () if ".." not in f.parts and f.suffix != ".pyc"]
        stem = next(f.parts[0] for f in files if f.parts[0].endswith(".dist-info")).removesuffix(".dist-info")
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            for file in files:
                if only_metadata and not file.parts[0].endswith(".dist-info"):
                    continue
                wheel.write(str(file.locate()), str(file))


def make_bare(folder: Path, distributions: Iterable[importlib.metadata.Distribution]) -> Path:
    """Make an environment that has only these distributions, as links; returns its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in distributions:
        for name in {f.parts[0] for f in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(distribution.locate_file(name))).resolve())
    return folder / "bin"


def run_bash(script: str, folder: Path, python_bin: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a clean environment with the Python in ``python_bin`` and without a network.

    Where the kernel allows a network namespace, there is no network at all. Elsewhere proxies that cannot be
    reached block it.
    """
    nowhere = "http://127.0.0.1:9"
    environment = {
        "PATH": os.pathsep.join((str(python_bin), "/usr/bin", "/bin")),
        "HOME": str(folder),
        **{f"{scheme}_proxy": nowhere for scheme in ("http", "https", "all")},
    }
    without_network = ["unshare", "--map-root-user", "--net"]
    unshare = shutil.which("unshare")
    granted = unshare and subprocess.run([*without_network, "true"], capture_output=True).returncode == 0
    return subprocess.run(
        [*(without_network if granted else ()), "bash", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
