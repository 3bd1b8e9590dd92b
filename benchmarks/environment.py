"""What a figure was measured on, which every result file carries, and the writing of such files."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import PIL.features
import torch
from rich.console import Console

from training.files import write_json

_PACKAGES = (
    *("torch", "torchvision", "numpy", "numba", "pillow", "ffcv", "opencv-python"),
    *("nvidia-dali-cuda130", "spdl", "simplejpeg", "lightly"),
)
# Linked into FFCV, and used by our decoder. The values are names of pkg-config.
_SYSTEM_LIBRARIES = {"libjpeg-turbo (system)": "libturbojpeg", "opencv (system)": "opencv4"}


def write_figures(path: Path, result: dict[str, Any], console: Console) -> None:
    """Write a benchmark's figures as JSON and print where they are."""
    write_json(path, result)
    console.print(f"written to {path}")


def environment() -> dict[str, Any]:
    """Return processor, cores, memory, GPU and library versions, as plain data."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["libjpeg-turbo (pillow)"] = PIL.features.version("libjpeg_turbo")
    for name, library in _SYSTEM_LIBRARIES.items():
        versions[name] = _output_of("pkg-config", "--modversion", library)
    processors = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)", processors, re.MULTILINE)
    flags = processors.split()
    facts = {
        "processor": model[1] if model else platform.processor(),
        "cpu_flags": {"avx2": "avx2" in flags, "avx512": "avx512f" in flags},
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }
    if torch.cuda.is_available():
        query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _output_of("nvidia-smi", *query),
        }
    return facts


def _output_of(*command: str) -> str | None:
    """Return what a program of the system prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
