"""What a figure was measured on, which every result file carries, and the writing of such files."""

import importlib.metadata
import os
import platform
import shutil
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
# What FFCV is linked with, and our engine decodes with: its name in pkg-config.
_SYSTEM_LIBRARIES = {"libjpeg-turbo (system)": "libturbojpeg", "opencv (system)": "opencv4"}
_CPU_FLAGS = {"avx2": "avx2", "avx512": "avx512f"}


def write_figures(path: Path, result: dict[str, Any], console: Console) -> None:
    """Write a benchmark's figures as JSON and say where they are."""
    write_json(path, result)
    console.print(f"written to {path}")


def environment() -> dict[str, Any]:
    """Processor, cores, memory, GPU and library versions, as plain data."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["libjpeg-turbo (pillow)"] = PIL.features.version("libjpeg_turbo")
    versions |= {name: _system_version(library) for name, library in _SYSTEM_LIBRARIES.items()}
    processor = _processor()
    flags = processor.get("flags", "").split()
    return {
        "processor": processor.get("model name", platform.processor()),
        "cpu_flags": {name: flag in flags for name, flag in _CPU_FLAGS.items()},
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **(_gpu_facts() if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def _gpu_facts() -> dict[str, Any]:
    """What a GPU's figures depend on beside its name."""
    return {
        "gpu_memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
    }


def _processor() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if not line.strip():
            break
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    return facts


def _system_version(library: str) -> str | None:
    """The version by pkg-config; None where that program or the library is missing."""
    return _said("pkg-config", "--modversion", library)


def _said(*command: str) -> str | None:
    """What a program of the system says; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
