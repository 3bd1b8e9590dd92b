"""Report what the project can use on this machine, and the command that installs what is missing.

    python -m training.install.doctor

Exits with 0 if the demo can run here and with 1 otherwise.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from models.batchnorm import missing_for_kernels
except ImportError as error:
    sys.exit(f"{error.name} is not installed, the set-up did not finish; run make setup again")

Status = Literal["ok", "absent", "broken"]

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_COLORS: dict[Status, str] = {"ok": "green", "absent": "yellow", "broken": "red"}
_SETUP = "make setup"
_INSTALL_FFCV = (
    "apt install libopencv-dev libturbojpeg0-dev pkg-config && pip install -e '.[ffcv]' (for benchmarks only)"
)
_INSTALL_DALI = "pip install -e '.[dali]'"
_INSTALL_DETECTRON2 = (
    "make setup; for GPUs pip install git+https://github.com/facebookresearch/detectron2 (for detection)"
)
_REQUIRED = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "numba": "numba",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tyro": "tyro",
    "matplotlib": "matplotlib",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
"""Packages that the demo imports, and the distributions they come from."""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    """What was checked."""
    status: Status
    """absent: not installed; broken: installed but unusable."""
    detail: str
    """Version, size, or why it does not work."""
    fix: str = ""
    """The command or step that fixes it; empty if there is nothing to do."""
    needed: bool = False
    """Whether the demo needs it."""


def main(console: Console | None = None, examine: Callable[[], list[Finding]] | None = None) -> int:
    """Print the table, and whether the demo can run; returns the exit status."""
    console = console or Console()
    findings = (examine or check_machine)()
    table = Table(title="This machine")
    for column in ("what", "state", "found", "to fix it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colored = f"[{_COLORS[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, colored, escape(finding.detail), escape(finding.fix))
    console.print(table)
    missing = [finding.name for finding in findings if finding.needed and finding.status != "ok"]
    if missing:
        console.print(f"[red]The demo cannot run here:[/] first fix {', '.join(missing)}.")
        return 1
    console.print("[green]The demo can run here.[/]")
    return 0


def check_machine() -> list[Finding]:
    """Run all checks, in the order of the table."""
    core = [check_torch(_SETUP)]
    core += [check_package(package, name, _SETUP, needed=True) for package, name in _REQUIRED.items()]
    decoder = check_decoder()
    dali = check_package("nvidia.dali", "nvidia-dali-cuda130", _INSTALL_DALI)
    return [
        check_python(),
        *core,
        decoder,
        check_library("opencv4", "apt install libopencv-dev"),
        check_package("ffcv", "ffcv", _INSTALL_FFCV),
        dali,
        check_package("detectron2", "detectron2", _INSTALL_DETECTRON2),
        _check_backend("folder", core[:2], _SETUP),
        _check_backend("ffcv", [decoder], decoder.fix),
        _check_backend("dali", [dali], _INSTALL_DALI),
        check_cores(),
        check_memory(),
        check_disk(Path.cwd()),
        *check_gpus(),
        check_fashion_mnist(),
    ]


# ======================================================================================================
# Software
# ======================================================================================================


def check_python() -> Finding:
    """Check that Python is 3.11 or newer."""
    good = sys.version_info >= (3, 11)
    fix = "" if good else "install Python 3.11 or newer"
    return Finding("python", "ok" if good else "broken", platform.python_version(), fix, needed=True)


def check_torch(fix: str) -> Finding:
    """Check that torch is installed and new enough."""
    finding = check_package("torch", "torch", fix, needed=True)
    try:
        from training import cli

        cli.check_torch()
    except ImportError as error:
        return Finding("torch", "broken", str(error), fix, needed=True)
    return finding


def check_package(package: str, distribution: str, fix: str, needed: bool = False) -> Finding:
    """Import a package and report its version, or the reason why it cannot be imported."""
    num_threads = torch.get_num_threads()  # importing ffcv sets it to 1
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and (package == error.name or package.startswith(f"{error.name}.")):
            return Finding(package, "absent", "not installed", fix, needed)
        return Finding(package, "broken", f"needs {error.name}, which is not installed", fix, needed)
    except Exception as error:  # a compiled package may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(package, "broken", reason, fix, needed)
    finally:
        torch.set_num_threads(num_threads)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return Finding(package, "ok", version, needed=needed)


def check_library(name: str, fix: str) -> Finding:
    """Look up a system library with pkg-config."""
    if shutil.which("pkg-config") is None:
        return Finding(name, "absent", "pkg-config is not installed", "apt install pkg-config")
    ended = subprocess.run(
        ["pkg-config", "--modversion", name], capture_output=True, text=True, check=False, timeout=20
    )
    if ended.returncode:
        return Finding(name, "absent", "unknown to pkg-config; only building ffcv needs it", fix)
    return Finding(name, "ok", ended.stdout.strip())


def check_decoder() -> Finding:
    """Check the libturbojpeg that the loader would use."""
    fix = "apt install libturbojpeg0, or set LIBTURBOJPEG to the path of its file"
    try:
        from pipelines.kernels import turbojpeg

        library = turbojpeg.library()
    except ImportError as error:
        return Finding("libturbojpeg", "absent", str(error), fix, needed=True)
    except ValueError as error:
        return Finding("libturbojpeg", "broken", str(error), fix, needed=True)
    return Finding("libturbojpeg", "ok", library._name, needed=True)


def _check_backend(name: str, requirements: list[Finding], fix: str) -> Finding:
    missing = [finding.name for finding in requirements if finding.status != "ok"]
    if missing:
        return Finding(f"backend {name}", "absent", f"lacks {', '.join(missing)}", fix)
    return Finding(f"backend {name}", "ok", "ready")


# ======================================================================================================
# Hardware and data
# ======================================================================================================


def check_cores() -> Finding:
    """Report the cores this process may use; a container may allow fewer than the machine has."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", "ok", f"{usable} usable of {os.cpu_count()}")


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Check the memory that is available to a new process."""
    if not meminfo.exists():
        return Finding("memory", "absent", f"this system has no {meminfo}")
    lines = [line for line in meminfo.read_text().splitlines() if ":" in line]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    free_gib, total_gib = kib["MemAvailable"] / 2**20, kib["MemTotal"] / 2**20
    detail = f"{free_gib:.1f} of {total_gib:.1f} GiB free"
    fix = "" if free_gib >= 2 else "the demo takes about 2 GiB; close other programs"
    return Finding("memory", "broken" if fix else "ok", detail, fix, needed=True)


def check_disk(folder: Path) -> Finding:
    """Check the free space in the default folder of runs and compiled sets."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    fix = "" if free_gib >= 1 else f"the demo writes up to 1 GiB; free some space under {folder}"
    return Finding("disk", "broken" if fix else "ok", f"{free_gib:.1f} GiB free under {folder}", fix, True)


def check_gpus() -> list[Finding]:
    """Report each GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return [Finding("gpu", "absent", "PyTorch finds none; everything runs on the CPU, only slower")]
    rows = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        memory_gib = properties.total_memory / 2**30
        detail = f"{properties.name}, {memory_gib:.0f} GiB, bf16 {'yes' if has_bf16 else 'no: fp16 is used'}"
        rows.append(Finding(f"gpu {number}", "ok", detail))
    missing, _, fix = missing_for_kernels().partition(": ")
    detail = missing or "can be compiled"
    return [*rows, Finding("gpu kernels", "absent" if missing else "ok", detail, fix)]


def check_fashion_mnist(folder: Path = _FASHION_MNIST) -> Finding:
    """Check that the demo's labelled images are installed."""
    files = sorted(folder.glob("*ubyte*")) if folder.is_dir() else []
    if len(files) < 4:
        detail = f"{len(files)} of 4 files under {folder}; the demo will download them"
        return Finding("fashion-mnist", "absent", detail, "apt install dataset-fashion-mnist")
    return Finding("fashion-mnist", "ok", str(folder))


if __name__ == "__main__":
    sys.exit(main())
