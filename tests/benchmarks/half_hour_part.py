"""A part whose rows are quick, slow, broken or deadly: what the half hour must survive."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.half_hour.plan import Row, Setup


def rows(setup: Setup) -> dict[str, Row]:
    """Those named in the file ``rows``; each notes in a file of its own how often it was begun."""

    def noting(name: str, act: Any) -> Row:
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
        "before": noting("before", lambda: sys.stdout.write("noise")),
        "hangs": noting("hangs", hang),
        "fails": noting("fails", fail),
        "dies": noting("dies", lambda: os._exit(7)),
        "lacks": noting("lacks", lack),
        "after": noting("after", lambda: None),
    }
    found["kills"] = noting("kills", kill_parent_once)
    found["dear"] = Row(dict, cost_s=1e9, limit_s=1.0)
    return {name: found[name] for name in (Path(setup.out) / "rows").read_text().split()}
