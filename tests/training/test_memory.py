"""Freed memory stays with the process, which shows in the page faults of allocating it again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
def step():
    for _ in range(2):
        torch.ones(2 ** 24)
for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_reuses_the_memory_of_the_previous_one() -> None:
    faults = {}
    for way in ("returned", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True
        )
        faults[way] = int(done.stdout)
    # 64 MiB, which glibc maps again each time, are 16,384 pages, or 32 huge pages.
    assert faults["returned"] >= 4 * 2 * 32 > 10 * faults["kept"]
