"""Every line of the log can be parsed, and its means are those of the steps."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from training.logs import NonFiniteLoss, RunLog


def _log(run_dir: Path, **options: object) -> RunLog:
    console = Console(file=io.StringIO(), width=200)
    return RunLog(
        run_dir, **({"is_main": True, "total_steps": 10, "every_s": 1e9, "console": console} | options)
    )


def _rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_means_over_their_steps(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        for step in range(4):
            log.step(step, {"loss": torch.tensor(step + 1.0), "lr": 0.1 * step}, epoch=2, samples=8, wait_s=0)
        log.flush()
        log.step(4, {"loss": torch.tensor(9.0), "lr": 0.5}, epoch=3)
    first, second = _rows(tmp_path)
    assert (first["kind"], first["first_step"], first["step"], first["epoch"]) == ("step", 0, 3, 2)
    assert first["loss"] == pytest.approx(2.5) and first["lr"] == pytest.approx(0.15)
    assert first["samples_per_s"] > 0 and first["wait_percent"] == 0
    assert (second["first_step"], second["step"], second["loss"]) == (4, 4, 9.0)


def test_metrics_are_fetched_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, fetches = 0.0, []
    monkeypatch.setattr("training.logs.time.monotonic", lambda: now)
    fetch = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: fetches.append(now) or fetch(self))
    with _log(tmp_path, every_s=5.0) as log:
        for step in range(24):
            now = step / 2
            log.step(step, {"loss": torch.tensor(1.0), "acc1": torch.tensor(0.5)})
    # After one second, then every five, and once at the end.
    assert fetches == [1.0, 6.0, 11.0, 11.5]
    assert [row["step"] for row in _rows(tmp_path)] == [2, 12, 22, 23]


def test_events_follow_the_steps_before_them(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        log.step(0, {"loss": 1.0})
        log.event({"kind": "knn", "top1": 0.5, "note": "ünïcode"})
    rows = _rows(tmp_path)
    assert [row["kind"] for row in rows] == ["step", "knn"]
    assert rows[1]["top1"] == 0.5 and rows[1]["step"] == 0 and rows[1]["note"] == "ünïcode"
    with _log(tmp_path) as log, pytest.raises(ValueError, match="give it a kind other than 'step'"):
        log.event({"top1": 0.5})


def test_a_resumed_run_appends_and_drops_the_steps_that_it_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with _log(tmp_path) as log:
        for step in range(4):
            log.step(step, {"loss": step + 1.0})
            log.flush()
        log.event({"kind": "knn", "top1": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "lo')
    with _log(tmp_path, first_step=2) as log:
        log.step(2, {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in _rows(tmp_path)] == [(0, 1.0), (1, 2.0), (2, 30.0)]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("step/loss")] == [1.0, 2.0, 30.0]


def test_a_complete_log_is_unchanged(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        log.step(0, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").stat()
    with _log(tmp_path, first_step=1):
        pass
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_steps(tmp_path: Path, bad: float) -> None:
    log = _log(tmp_path)
    for step, loss in enumerate([1.0, bad, 1.0]):
        log.step(step, {"loss": torch.tensor(loss), "lr": 0.25})
    with pytest.raises(NonFiniteLoss, match=r"in step 1 \(learning rate 0\.25\); no epoch was finished"):
        log.flush()
    log.close()
    assert [row["loss"] for row in _rows(tmp_path)] == [None]


def test_a_loss_that_is_not_finite_is_found_in_a_later_window(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_000000002.pt").touch()
    message = r"nan in step 3 .* state is .*checkpoint_000000002\.pt"
    with pytest.raises(NonFiniteLoss, match=message), _log(tmp_path) as log:
        for step, loss in enumerate([1.0, 2.0, 3.0, math.nan, math.inf]):
            log.step(step, {"loss": torch.tensor(loss)})
            if step == 1:
                log.flush()


def test_the_line_shows_the_queue_while_it_fills(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    with _log(tmp_path, console=console, plain_every_s=0) as log:
        for step, filled in enumerate([0.25, 1.0]):
            log.step(step, {"loss": 1.5, "pos_sim": 0.75, "queue_filled": filled})
            log.flush()
    filling, full = console.file.getvalue().splitlines()
    assert "pos 0.75" in filling and "queue 25 % filled, the loss rises until it is full" in filling
    assert "queue" not in full


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with _log(tmp_path / "run", is_main=False) as log:
        log.step(0, {"loss": torch.tensor(math.nan)})
        log.event({"kind": "knn"})
        log.flush()
    assert not (tmp_path / "run").exists()


def test_plain_lines_are_occasional_and_show_progress(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    with _log(tmp_path, console=console, plain_every_s=1e9) as log:
        for step in range(3):
            log.step(step, {"loss": 1.5, "lr": 0.03}, epoch=1, samples=4)
            log.flush()
    printed = console.file.getvalue().splitlines()
    assert len(printed) == 1
    for part in ("epoch 1", "step 0/10", "samples/s", "loss 1.5", "lr 0.03", "data wait 0 %"):
        assert part in printed[0]


def test_a_terminal_has_a_progress_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with _log(tmp_path, console=console) as log:
        log.step(0, {"loss": 1.5, "lr": 0.03}, epoch=1, samples=4)
        log.flush()
        log.event({"kind": "knn", "top1": 0.25})
    assert "loss 1.5" in console.file.getvalue() and "top1 0.25" in console.file.getvalue()


def test_tensorboard_holds_the_same_values(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with _log(tmp_path) as log:
        log.step(0, {"loss": 1.5})
        log.event({"kind": "knn", "top1": 0.25})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("step/loss")[0].value == 1.5
    assert events.Scalars("knn/top1")[0].value == 0.25
