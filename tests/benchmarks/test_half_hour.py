"""The half hour: rehearsed without a GPU, killed and resumed; its arithmetic on logs and traces."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.half_hour import __main__ as program
from benchmarks.half_hour import figures, plan, rows, steps, worker
from benchmarks.half_hour.__main__ import HalfHour, main
from benchmarks.half_hour.plan import PARTS, TINY, Setup
from benchmarks.half_hour.worker import Row
from benchmarks.peers.contract import image_files
from benchmarks.report.page import half_hour_view
from benchmarks.report.results import read_figures
from benchmarks.sample_sets import SampleSet
from models.batch import Method
from tests.benchmarks import half_hour_part
from training import cli

ROOT = Path(__file__).resolve().parents[2]
CPU = Setup("cpu", True, Path(), SampleSet(Path("none"), Path("none.beton"), Path("none.shards"), "none"))


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HalfHour:
    """Options that measure the misbehaving part, under the name check."""
    monkeypatch.setattr(program, "rows_of", half_hour_part.rows_of)
    monkeypatch.setattr(program, "prepare_images", lambda *_, out, **__: replace(CPU, out=out))
    (tmp_path / "out").mkdir()
    return HalfHour(("check",), tmp_path / "x.json", out=tmp_path / "out", device="cpu", tiny=True)


def _rows(options: HalfHour, part: str = "check") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(options.json.read_text())["parts"][part]
    return found


def _begun(options: HalfHour) -> dict[str, int]:
    known = ("before", "hangs", "fails", "dies", "lacks", "kills", "after")
    return {n: len((options.out / n).read_text()) for n in known if (options.out / n).exists()}


# -------------------------------------------------------------------------------------------------- limits


def test_a_failure_is_a_row_and_the_next_row_is_measured(options: HalfHour) -> None:
    (options.out / "rows").write_text("before lacks fails dies hangs after expensive")
    main(options)
    found = _rows(options)
    assert found["before"]["median"] == found["after"]["median"] == 1.0
    assert found["hangs"]["reason"] == "out of time after 2 s"
    assert found["fails"]["reason"] == "failed: RuntimeError: it cannot work"
    assert found["dies"]["reason"].startswith("failed: its process ended with code 7")
    assert found["lacks"]["reason"] == "left out: the package nothing is not installed"
    assert "expensive" not in found, "it does not fit into the time left"
    child = int((options.out / "child").read_text())
    for _ in range(100):  # a killed process is there until it is reaped
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_second_run_measures_what_is_missing_and_again_all(options: HalfHour) -> None:
    (options.out / "rows").write_text("before lacks after")
    main(options)
    main(options)
    assert _begun(options) == {"before": 1, "lacks": 2, "after": 1}
    main(replace(options, again=True))
    assert _begun(options) == {"before": 2, "lacks": 3, "after": 2}


def test_a_killed_run_keeps_its_rows_and_the_next_run_resumes(options: HalfHour) -> None:
    (options.out / "rows").write_text("before kills after")
    words = f"""
from pathlib import Path
from benchmarks.half_hour import __main__ as program
from tests.benchmarks import half_hour_part, test_half_hour
program.rows_of = half_hour_part.rows_of
setup = test_half_hour.replace(test_half_hour.CPU, out=Path({str(options.out)!r}))
program.prepare_images = lambda *_, **__: setup
program.main(program.HalfHour(("check",), Path({str(options.json)!r}), out=Path({str(options.out)!r}),
                              device="cpu", tiny=True))
"""
    ended = subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False, timeout=120)
    assert ended.returncode == -9
    assert list(_rows(options)) == ["before"]
    main(options)
    assert [name for name, row in _rows(options).items() if row["median"]] == ["before", "kills", "after"]
    assert _begun(options) == {"before": 1, "kills": 2, "after": 1}


def test_figures_of_another_setup_are_not_mixed(options: HalfHour) -> None:
    (options.out / "rows").write_text("expensive")
    main(options)
    content = json.loads(options.json.read_text())
    content["config"]["queue_len"] = 128
    content["environment"]["versions"]["torch"] = "1.0"
    options.json.write_text(json.dumps(content))
    before = options.json.read_bytes()
    with pytest.raises(ValueError, match=r"torch was 1\.0.*queue_len was 128, is 64.*another --json"):
        main(options)
    assert options.json.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"device": "cuda"}, "sees no GPU; .* --device cpu --tiny"),
        ({"device": "cpu", "tiny": False}, "add --tiny"),
        ({"minutes": 0.0}, r"--minutes is 0\.0; it must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    wrong: Mapping[str, Any],
    sentence: str,
    options: HalfHour,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(replace(options, **wrong)))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.search(sentence, line)
    assert not options.json.exists(), "nothing is made before"


# ---------------------------------------------------------------------------------------------- rehearsal


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_without_a_gpu_measures_all_rows_of_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "results" / "half_hour.json"
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--json",
        out,
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
    ]
    command = [sys.executable, "-m", "benchmarks.half_hour", *map(str, arguments)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert (
        said.splitlines()[-2].startswith(f"figures: {out}") and said.splitlines()[-1] == "next: make report"
    )
    found = read_figures(out, "half_hour")
    parts = found["parts"]
    shown = half_hour_view(found)["parts"]
    assert found["quick"] and tuple(found["expected"]) == tuple(shown) == PARTS
    gpu_alone = ("pinned", "compiled", "--c", "graph", "decode_jpeg")
    rates = {part: [bar for bars in view["rates"].values() for bar in bars] for part, view in shown.items()}
    for part, view in shown.items():
        measured, missing = parts[part], {name for names in view["missing"].values() for name in names}
        assert missing == {name for name in measured if any(word in name for word in gpu_alone)}
        assert set(view["missing"]) <= {"needs a GPU"}
        assert {bar.name for bar in rates[part]} == {n for n, row in measured.items() if "median" in row}
        assert all(bar.low <= bar.median <= bar.high for bar in rates[part])
    assert {len(bars) for part, bars in rates.items() if part != "check"} == {0, 1, 3, 4, 9, 12}
    run = parts["train"]["eager"]
    assert 0 < run["stopped_at"] < run["steps"] == TINY.train_steps and 0 <= run["wait_percent"] <= 100
    assert len(parts["step"]["profile of mixmask, 8 groups, eager"]["kernels"]) == 10


def test_images_are_found_or_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    monkeypatch.setattr(plan.turbojpeg, "is_found", lambda: False)
    drawn = plan.prepare_images("cpu", tiny=True, data=data, out=out)
    assert len(image_files(drawn.images.folder)) == TINY.num_images and drawn.reads == drawn.images.folder
    assert not any(path.exists() for path in (drawn.images.beton, drawn.images.shards, drawn.long_set)), (
        "nothing can be compiled without libturbojpeg"
    )
    (data / "photographs-q86" / "train").mkdir(parents=True)
    found = plan.prepare_images("cpu", tiny=False, data=data, out=out).images
    assert found.folder == data / "photographs-q86" / "train" and "photographs" in found.how
    (data / "photographs-q86" / "train").rmdir()
    (data / "photographs-q86").rmdir()
    (data / "photographs-q86.beton").touch()
    with pytest.raises(ValueError, match="apt-get install libturbojpeg0"):
        plan.prepare_images("cpu", tiny=False, data=data, out=out)


# ---------------------------------------------------------------------------------------------- arithmetic


def test_rates_exclude_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took, calls = [0.0], iter([9.0, 4.0, 1.0]), [0]

    def call() -> None:
        calls[0] += 1
        now[0] += next(took, 0.5)

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    found = worker.rates(call, 10, CPU, "images/s", warm_up=2, queued=1)
    # Two calls and a turn of one call warm up; each of the two turns is one call of half a second.
    assert calls == [5] and found["turns"] == [20.0, 20.0] and found["unit"] == "images/s"


def test_idle_share_is_what_no_interval_covers() -> None:
    def spans(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"ts": start, "dur": end - start} for start, end in pairs]

    assert steps.idle_share(spans((10, 20), (12, 15), (30, 40), (18, 22), (40, 50))) == 8 / 40
    assert steps.idle_share(spans((1, 3))) == 0.0
    with pytest.raises(ValueError, match="recorded nothing"):
        steps.idle_share([])
    events = [{"name": "a", "ts": 0.0, "dur": 30.0}, {"name": "b", "ts": 40.0, "dur": 60.0}]
    assert steps.idle_share(events) == 0.1
    assert steps.top_kernels([*events, events[0], events[0]]) == [
        {"name": "a", "ms": 0.03, "percent": 60.0},
        {"name": "b", "ms": 0.02, "percent": 40.0},
    ]


def test_the_rate_of_a_log_excludes_the_steps_after_each_start() -> None:
    def line(first: int, last: int, rate: float, wait: float) -> dict[str, Any]:
        return {"first_step": first, "step": last, "samples_per_s": rate, "wait_percent": wait}

    lines = [line(0, 0, 1, 99), line(1, 9, 2, 99), line(10, 19, 100, 10), line(20, 24, 200, 30)]
    lines += [line(25, 30, 1, 99), line(31, 34, 1, 99), line(35, 44, 50, 0)]
    found = rows.steady(lines, (0, 25), batch_size=10)
    assert (found["median"], found["low"], found["high"]) == (100, 50, 200)
    # 1 s of which 10 % waits, 0.25 s of which 30 % waits, 2 s without.
    assert found["wait_percent"] == pytest.approx(100 * (0.1 + 0.075) / 3.25, abs=0.01)


def test_tests_are_counted_by_outcome(tmp_path: Path) -> None:
    cases = "def test_good(): pass\ndef test_bad(): assert 0\n"
    file = tmp_path / "test_x.py"
    file.write_text(
        f"import pytest\npytestmark = pytest.mark.gpu\n{cases}@pytest.mark.skip\ndef test_not(): pass\n"
    )
    found = worker.measure_row(Row(25, rows.gpu_tests, (str(file),)), CPU, tmp_path / "x.log", 100)
    assert found.pop("took_s") > 0
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_bad"]}
    marked = list(rows.rows_of(replace(CPU, tiny=False))["check"])
    assert "tests/benchmarks/test_half_hour.py" in marked and "tests/test_imports.py" not in marked


def test_rows_as_text() -> None:
    row = {"median": 1234.5, "low": 1000.0, "high": 1300.0, "unit": "samples/s", "cpu_share": 0.25}
    assert figures.rate_in_words(row) == "1,234 samples/s (1,000 … 1,300)"
    assert figures.facts_in_words(row | {"mean_error": None}) == {"host's cores": "25%"}
    assert figures.rate_in_words({"passed": 1}) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", steps.METHODS)
def test_a_captured_step_trains_as_the_plain_one(method: Method) -> None:
    setup = replace(CPU, device="cuda")
    (plain, train_plain), (graphed, train_graphed) = (
        steps.build_step(setup, method, 2, mode, "fp32") for mode in ("eager", "graph")
    )
    for _ in range(6):
        train_plain()
        train_graphed()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
