"""Two processes under torchrun: one is killed, one fails alone, and at last both finish.

torchrun is started once and restarts both processes after each failure, because they take seconds to start.
Each test checks a part of the output.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from training.checkpoint import latest, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
KILLED, ALONE, FINISHED = range(3)

# Attempt 0: rank 1 is killed in the second epoch. Attempt 1: it cannot open its data. Attempt 2: both finish.
DRIVER = """
import os, signal
import train_pretrain
from training import cli, run

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
lr_at, build_loader = run.lr_at, train_pretrain.build_loader

def dies(step, *args, **options):
    if step == 7 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_at(step, *args, **options)

def without_data(data, *args, **options):
    return build_loader(data.with_name("absent.beton") if rank == "1" else data, *args, **options)

if attempt == 0:
    run.lr_at = dies
if attempt == 1:
    train_pretrain.build_loader = without_data
if rank == "0":
    print(f"== attempt {attempt}", flush=True)
cli.program(train_pretrain.PretrainConfig, train_pretrain.main, parse=train_pretrain.parse)
"""

FLAGS = shlex.split(
    "--arch resnet10w16 --crop-px 32 --grid-size 4 --batch-size 8 --moco-k 24 --bn-splits 2 --epochs 3 "
    "--num-threads 1 --log-every-s 0 --device cpu --resume"
)


@dataclass(frozen=True)
class _Run:
    """The results of torchrun and both processes."""

    exit_code: int
    attempts: list[str]
    """The output of each attempt."""
    out: Path


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> _Run:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "driver.py").write_text(DRIVER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(folder / "driver.py"), str(beton), "--out", str(folder / "out"), *FLAGS]
    with subprocess.Popen(
        [*torchrun, "--max-restarts", "2", *script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=240)
        finally:
            process.terminate()  # torchrun ends the processes that it started
    attempts = re.split(r"== attempt \d\n", printed)[1:]
    assert len(attempts) == 3, printed[-3000:]
    return _Run(process.returncode, attempts, folder / "out")


def _errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error:")]


def test_the_survivor_of_a_killed_process_reports_it_and_ends(run: _Run) -> None:
    (line,) = _errors(run.attempts[KILLED])
    assert re.match(r"error: rank 0: lost the connection to the run's other processes \(.+\)", line)
    assert "--resume" in line


def test_no_tracebacks(run: _Run) -> None:
    assert not any("Traceback" in printed for printed in run.attempts)


def test_a_failure_of_one_rank_is_reported_with_its_rank_and_nothing_else(run: _Run) -> None:
    (line,) = _errors(run.attempts[ALONE])
    assert line.startswith("error: rank 1: ") and "absent.beton" in line


def test_the_restarted_run_continues_from_its_checkpoint_to_the_end(run: _Run) -> None:
    assert run.exit_code == 0
    assert not _errors(run.attempts[FINISHED])
    assert "continuing after step 5" in run.attempts[FINISHED]
    assert run.attempts[FINISHED].count("finished:") == 1
    state = load_checkpoint(latest(run.out))
    assert state.step == 15 and int(state.model["queue_ptr"]) == 15 * 8 % 24


def test_one_log_holds_every_step_once(run: _Run) -> None:
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    steps = [
        step for row in rows if row["kind"] == "step" for step in range(row["first_step"], row["step"] + 1)
    ]
    assert steps == list(range(15))
    assert len(list((run.out / "tensorboard").iterdir())) >= 1
