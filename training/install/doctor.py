"""What this machine has of what the project can use, and the command that mends each gap.

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

Verdict = Literal["ok", "absent", "broken"]

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_MARKS: dict[Verdict, str] = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    """What was looked at."""
    verdict: Verdict
    """absent: not there; broken: there but unusable."""
    detail: str
    """Version, size, or why it does not work."""
    mend: str = ""
    """The command or step that puts it right; empty where nothing is to be done."""
    needed: bool = False
    """Whether the demo cannot run without it."""


def check_package(package: str, distribution: str, mend: str, needed: bool = False) -> Finding:
    """Import a package and report its version; a failing import is reported with its reason."""
    # ffcv sets torch to one thread as it is imported.
    num_threads = torch.get_num_threads()
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and (package == error.name or package.startswith(f"{error.name}.")):
            return Finding(package, "absent", "not installed", mend, needed)
        return Finding(package, "broken", f"needs {error.name}, which is not installed", mend, needed)
    except Exception as error:  # compiled packages fail in their own ways, all of them worth a row
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(package, "broken", reason, mend, needed)
    finally:
        torch.set_num_threads(num_threads)
    return Finding(package, "ok", _version(distribution), needed=needed)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def check_library(name: str, mend: str) -> Finding:
    """Ask pkg-config for a system library; without pkg-config nothing can be said."""
    if shutil.which("pkg-config") is None:
        return Finding(name, "absent", "pkg-config is not installed", "apt install pkg-config")
    answer = subprocess.run(
        ["pkg-config", "--modversion", name], capture_output=True, text=True, check=False, timeout=20
    )
    if answer.returncode:
        return Finding(name, "absent", "unknown to pkg-config; only building ffcv needs it", mend)
    return Finding(name, "ok", answer.stdout.strip())


def check_decoder() -> Finding:
    """The libturbojpeg that the loader decodes with, wherever it is found."""
    mend = "apt install libturbojpeg0, or name its file in LIBTURBOJPEG"
    try:
        # By name, as packages are: engine may not import pipelines.
        library = importlib.import_module("pipelines.kernels.turbojpeg").library()
    except ImportError as error:
        return Finding("libturbojpeg", "absent", str(error), mend, needed=True)
    except ValueError as error:
        return Finding("libturbojpeg", "broken", str(error), mend, needed=True)
    return Finding("libturbojpeg", "ok", library._name, needed=True)


def check_torch(mend: str) -> Finding:
    """torch: there, and new enough."""
    found = check_package("torch", "torch", mend, needed=True)
    try:
        importlib.import_module("training.cli").check_torch()
    except ImportError as error:
        return Finding("torch", "broken", str(error), mend, needed=True)
    return found


def check_python() -> Finding:
    """Python itself: 3.11 or newer."""
    good = sys.version_info >= (3, 11)
    mend = "" if good else "install Python 3.11 or newer"
    return Finding("python", "ok" if good else "broken", platform.python_version(), mend, needed=True)


def check_cores() -> Finding:
    """Cores this process may use, which a container can make fewer than the machine has."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", "ok", f"{usable} usable of {os.cpu_count()}")


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Memory a new process could take."""
    if not meminfo.exists():
        return Finding("memory", "absent", "this system does not tell")
    sizes = {
        line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines() if ":" in line
    }
    free_gib, total_gib = sizes["MemAvailable"] / 2**20, sizes["MemTotal"] / 2**20
    mend = "" if free_gib >= 2 else "the demo takes about 2 GiB; close other programs"
    return Finding(
        "memory", "broken" if mend else "ok", f"{free_gib:.1f} of {total_gib:.1f} GiB free", mend, True
    )


def check_disk(folder: Path) -> Finding:
    """Free space where runs and compiled sets are written by default."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    mend = "" if free_gib >= 1 else f"the demo writes up to 1 GiB; free some space under {folder}"
    return Finding("disk", "broken" if mend else "ok", f"{free_gib:.1f} GiB free under {folder}", mend, True)


def check_gpus() -> list[Finding]:
    """One row for each GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return [Finding("gpu", "absent", "PyTorch sees none; everything runs on the CPU, only slower")]
    rows = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        memory_gib = properties.total_memory / 2**30
        detail = f"{properties.name}, {memory_gib:.0f} GiB, bf16 {'yes' if has_bf16 else 'no: fp16 is used'}"
        rows.append(Finding(f"gpu {number}", "ok", detail))
    lacking, _, mend = missing_for_kernels().partition(": ")
    detail = lacking or "can be compiled"
    return [*rows, Finding("gpu kernels", "absent" if lacking else "ok", detail, mend)]


def check_fashion_mnist(folder: Path = _FASHION_MNIST) -> Finding:
    """The labelled pictures the demo learns from."""
    files = sorted(folder.glob("*ubyte*")) if folder.is_dir() else []
    if len(files) < 4:
        detail = f"{len(files)} of 4 files under {folder}; the demo will download them"
        return Finding("fashion-mnist", "absent", detail, "apt install dataset-fashion-mnist")
    return Finding("fashion-mnist", "ok", str(folder))


def _backend(name: str, needs: list[Finding], mend: str) -> Finding:
    lacking = [finding.name for finding in needs if finding.verdict != "ok"]
    if lacking:
        return Finding(f"backend {name}", "absent", f"lacks {', '.join(lacking)}", mend)
    return Finding(f"backend {name}", "ok", "ready")


def examine() -> list[Finding]:
    """Look at everything; rows in the order of the table."""
    install = "make setup"
    core = [check_torch(install)] + [
        check_package(package, distribution, install, needed=True)
        for package, distribution in (
            ("torchvision", "torchvision"),
            ("numpy", "numpy"),
            ("numba", "numba"),
            ("PIL", "pillow"),
            ("safetensors", "safetensors"),
            ("tensorboard", "tensorboard"),
            ("tyro", "tyro"),
            ("matplotlib", "matplotlib"),
            ("skimage", "scikit-image"),
            ("sklearn", "scikit-learn"),
        )
    ]
    decoder = check_decoder()
    opencv = check_library("opencv4", "apt install libopencv-dev")
    install_ffcv = "apt install libopencv-dev libturbojpeg0-dev pkg-config && pip install -e '.[ffcv]'"
    ffcv = check_package("ffcv", "ffcv", f"{install_ffcv} (for benchmarks alone)")
    install_dali = "pip install -e '.[dali]'"
    dali = check_package("nvidia.dali", "nvidia-dali-cuda130", install_dali)
    detectron = check_package(
        "detectron2",
        "detectron2",
        "make setup; for GPUs pip install git+https://github.com/facebookresearch/detectron2 (for detection)",
    )
    backends = [
        _backend("folder", core[:2], install),
        _backend("ffcv", [decoder], decoder.mend),
        _backend("dali", [dali], install_dali),
    ]
    machine = [check_cores(), check_memory(), check_disk(Path.cwd()), *check_gpus()]
    return [
        check_python(), *core, decoder, opencv, ffcv, dali, detectron, *backends, *machine,
        check_fashion_mnist(),
    ]  # fmt: skip


def can_run_demo(findings: list[Finding]) -> bool:
    """Whether all that the demo needs is in order."""
    return all(finding.verdict == "ok" for finding in findings if finding.needed)


def main(console: Console | None = None, look: Callable[[], list[Finding]] = examine) -> int:
    """Print the table, what would mend each gap, and whether the demo can run; the exit status."""
    console = console or Console()
    findings = look()
    table = Table(title="What this machine has")
    for column in ("what", "state", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, _MARKS[finding.verdict], escape(finding.detail), escape(finding.mend))
    console.print(table)
    if can_run_demo(findings):
        console.print("[green]The demo can run here.[/]")
        return 0
    lacking = [f.name for f in findings if f.needed and f.verdict != "ok"]
    console.print(f"[red]The demo cannot run here:[/] first mend {', '.join(lacking)}.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
