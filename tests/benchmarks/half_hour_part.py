"""A part with rows that work, hang, fail, or kill a process: what the half hour must survive."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.half_hour.plan import Row, Setup


def rows(setup: Setup) -> dict[str, Row]:
    """The rows named in the file ``rows``; each counts its starts in a file of its own."""

    def counting(name: str, act: Any) -> Row:
        def measure() -> dict[str, Any]:
            with (Path(setup.out) / name).open("a") as file:
                file.write("x")
            act()
            return {"median": 1.0, "low": 1.0, "high": 1.0, "turns": [1.0], "unit": "rows/s"}

        return Row(measure, cost_s=0.1, limit_s=2.0 if name == "hangs" else 60.0)

    def kill_parent_once() -> None:
        if (Path(setup.out) / "kills").read_text() == "x":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)

    def fail() -> None:
        raise RuntimeError("it cannot\nwork")

    def hang() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (Path(setup.out) / "child").write_text(str(child.pid))
        child.wait()

    def lack() -> None:
        raise ImportError("the package nothing is not installed")

    found = {
        "before": counting("before", lambda: sys.stdout.write("noise")),
        "hangs": counting("hangs", hang),
        "fails": counting("fails", fail),
        "dies": counting("dies", lambda: os._exit(7)),
        "lacks": counting("lacks", lack),
        "after": counting("after", lambda: None),
    }
    found["kills"] = counting("kills", kill_parent_once)
    found["expensive"] = Row(dict, cost_s=1e9, limit_s=1.0)
    return {name: found[name] for name in (Path(setup.out) / "rows").read_text().split()}
