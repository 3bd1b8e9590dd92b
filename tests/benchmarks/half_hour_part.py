"""A part with rows that work, hang, fail, or kill a process: what the half hour must survive."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.half_hour.plan import Setup
from benchmarks.half_hour.worker import Row


def rows_of(setup: Setup) -> dict[str, dict[str, Row]]:
    """The rows named in the file ``rows``, under the name check."""
    special = {
        "hangs": Row(0.5, _counted, ("hangs",), grace_s=1.0),
        "expensive": Row(1e9, _counted, ("expensive",)),
    }
    names = (setup.out / "rows").read_text().split()
    return {"check": {name: special.get(name, Row(0.1, _counted, (name,))) for name in names}}


def _counted(setup: Setup, name: str) -> dict[str, Any]:
    """Count the starts of a row in a file of its own, and act."""
    with (setup.out / name).open("a") as file:
        file.write("x")
    if name == "before":
        sys.stdout.write("noise")
    if name == "fails":
        raise RuntimeError("it cannot\nwork")
    if name == "dies":
        os._exit(7)
    if name == "lacks":
        raise ImportError("the package nothing is not installed")
    if name == "hangs":
        _hang(setup.out)
    if name == "kills" and (setup.out / name).read_text() == "x":
        parent = multiprocessing.parent_process()
        assert parent and parent.pid
        os.kill(parent.pid, signal.SIGKILL)
        time.sleep(60)
    return {"median": 1.0, "low": 1.0, "high": 1.0, "turns": [1.0], "unit": "rows/s"}


def _hang(out: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "child").write_text(str(child.pid))
    child.wait()
