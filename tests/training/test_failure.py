"""Failing processes of one run, started as torchrun starts them: which one prints, and what."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = """
import signal, sys
from training import failure
line = failure.report(*sys.argv[1:])
assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
print(line or "-")
"""
RAISE = """
import sys, traceback
from training import failure
with failure.exit_on_failure():
    raise {}
"""


def _start(folder: Path | None, rank: int, program: str, *argv: str, num_local: int = 2) -> subprocess.Popen:
    env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(num_local), "PYTHONPATH": str(ROOT)}
    env.pop("TORCHELASTIC_ERROR_FILE", None)
    if folder is not None:
        (folder / str(rank)).mkdir()
        env["TORCHELASTIC_ERROR_FILE"] = str(folder / str(rank) / "error.json")
    command = [sys.executable, "-c", program, *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _lines(*processes: subprocess.Popen) -> list[str]:
    ends = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), ends
    return [out.strip() for out, _ in ends]


def test_a_failure_of_all_is_printed_once_without_a_rank(tmp_path: Path) -> None:
    lines = _lines(*(_start(tmp_path, rank, REPORT, "no such file") for rank in range(2)))
    assert sorted(lines) == ["-", "no such file"]


def test_different_failures_are_printed_with_their_ranks(tmp_path: Path) -> None:
    lines = _lines(*(_start(tmp_path, rank, REPORT, f"message {rank}") for rank in range(2)))
    assert lines == ["rank 0: message 0", "rank 1: message 1"]


def test_torchrun_finds_the_message(tmp_path: Path) -> None:
    _lines(_start(tmp_path, 1, REPORT, "no such file"))
    message = json.loads((tmp_path / "1" / "error.json").read_text())["message"]
    assert message["message"] == "no such file"
    assert abs(message["extraInfo"]["timestamp"] - time.time()) < 60


def test_a_lost_process_prints_only_without_another_failure(tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    one.mkdir()
    assert _lines(_start(both, 1, REPORT, "own mistake")) == ["rank 1: own mistake"]
    assert _lines(_start(both, 0, REPORT, "peer gone", "lost")) == ["-"]
    assert _lines(_start(one, 0, REPORT, "peer gone", "lost")) == ["rank 0: peer gone"]


def test_without_torchruns_folder_every_process_prints() -> None:
    lines = _lines(*(_start(None, rank, REPORT, "no such file") for rank in range(2)))
    assert lines == ["rank 0: no such file", "rank 1: no such file"]


@pytest.mark.parametrize(
    ("error", "code", "said"), [("SystemExit(2)", 2, ""), ("KeyError('x')", 1, "KeyError: 'x'\n")]
)
def test_a_failing_process_exits_with_its_code(error: str, code: int, said: str, tmp_path: Path) -> None:
    process = _start(tmp_path, 0, RAISE.format(error), num_local=1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.endswith(said) and err.startswith("rank 0: Traceback" if said else "")
