"""Processes that fail together, as torchrun would have started them: who speaks, and what."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TELL = """
import signal, sys
from training import failure
told = failure.report(*sys.argv[1:])
assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
print(told or "-")
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


def _told(*processes: subprocess.Popen) -> list[str]:
    ends = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), ends
    return [out.strip() for out, _ in ends]


def test_a_failure_of_all_is_told_once_and_without_a_rank(tmp_path: Path) -> None:
    told = _told(*(_start(tmp_path, rank, TELL, "no such file") for rank in range(2)))
    assert sorted(told) == ["-", "no such file"]


def test_different_failures_are_told_with_their_ranks(tmp_path: Path) -> None:
    told = _told(*(_start(tmp_path, rank, TELL, f"sentence {rank}") for rank in range(2)))
    assert told == ["rank 0: sentence 0", "rank 1: sentence 1"]


def test_torchrun_finds_the_sentence(tmp_path: Path) -> None:
    _told(_start(tmp_path, 1, TELL, "no such file"))
    message = json.loads((tmp_path / "1" / "error.json").read_text())["message"]
    assert message["message"] == "no such file"
    assert abs(message["extraInfo"]["timestamp"] - time.time()) < 60


def test_the_lost_speak_only_where_nobody_else_has(tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    one.mkdir()
    assert _told(_start(both, 1, TELL, "own mistake")) == ["rank 1: own mistake"]
    assert _told(_start(both, 0, TELL, "peer gone", "lost")) == ["-"]
    assert _told(_start(one, 0, TELL, "peer gone", "lost")) == ["rank 0: peer gone"]


def test_without_torchruns_folder_everybody_speaks() -> None:
    told = _told(*(_start(None, rank, TELL, "no such file") for rank in range(2)))
    assert told == ["rank 0: no such file", "rank 1: no such file"]


@pytest.mark.parametrize(
    ("error", "code", "said"), [("SystemExit(2)", 2, ""), ("KeyError('x')", 1, "KeyError: 'x'\n")]
)
def test_a_failing_process_ends_with_its_code(error: str, code: int, said: str, tmp_path: Path) -> None:
    process = _start(tmp_path, 0, RAISE.format(error), num_local=1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.endswith(said) and err.startswith("rank 0: Traceback" if said else "")
