"""Memory that stays with the process: seen by the page faults of taking and freeing it again."""

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
def test_a_step_takes_the_memory_of_the_one_before() -> None:
    faults = {}
    for way in ("returned", "kept"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True
        )
        faults[way] = int(done.stdout)
    # 64 MiB, which glibc always maps anew, are 16,384 pages, or 32 of the larger kind.
    assert faults["returned"] >= 4 * 2 * 32 > 10 * faults["kept"]
