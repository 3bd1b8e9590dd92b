"""Repeated runs of a detector: their summary, and which of them are trained."""

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from detection.repeat import main

FIGURES = [(50.0, 80.0, 55.0), (51.5, 81.0, 54.0), (49.0, 79.5, 56.5)]
NAMES = ("AP", "AP50", "AP75")


class TrainNet:
    """Replaces detection.train_net: records the command lines, writes checkpoints and results."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.codes: dict[int, int] = {}
        """Exit codes of failing runs, by seed."""
        self.figures: Sequence[tuple[float | None, ...]] = FIGURES

    def run(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(command)
        option, seed, other_option, folder = command[-4:]
        assert (option, other_option) == ("SEED", "OUTPUT_DIR")
        code = self.codes.get(int(seed), 0)
        if not code:
            row = dict(zip(NAMES, self.figures[int(seed) - 1], strict=True))
            Path(folder).mkdir(parents=True)
            (Path(folder) / "last_checkpoint").write_text("model_final.pth")
            # The summary has no figures per class, so these may be null.
            result = {"figures": {"bbox": row | {"AP-disc": None}}}
            (Path(folder) / "result.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, code)

    @property
    def seeds(self) -> list[int]:
        return [int(command[-3]) for command in self.commands]


@pytest.fixture
def train_net(monkeypatch: pytest.MonkeyPatch) -> TrainNet:
    stand_in = TrainNet()
    monkeypatch.setattr("detection.repeat.subprocess.run", stand_in.run)
    return stand_in


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """Arguments for three runs."""
    (tmp_path / "weights.pth").write_bytes(b"some")
    weights, out = str(tmp_path / "weights.pth"), str(tmp_path / "out")
    return ["--runs", "3", "--config-file", "c.yaml", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", out]


def test_mean_and_standard_deviation(train_net: TrainNet, argv: list[str], tmp_path: Path) -> None:
    summary = main(argv)
    for place, name in enumerate(NAMES):
        values = [row[place] for row in FIGURES]
        assert summary["figures"]["bbox"][name] == {
            "mean": pytest.approx(statistics.mean(values)),
            "std": pytest.approx(statistics.stdev(values)),
        }
    assert summary["figures"]["bbox"].keys() == set(NAMES)
    assert [run["figures"]["bbox"]["AP"] for run in summary["runs"]] == [50.0, 51.5, 49.0]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == summary
    weights = str(tmp_path / "weights.pth")
    for seed, command in enumerate(train_net.commands, start=1):
        folder = str(tmp_path / "out" / f"run-{seed - 1}")
        assert command[1:] == [
            *("-m", "detection.train_net", "--resume", "--config-file", "c.yaml", "MODEL.WEIGHTS", weights),
            *("SEED", str(seed), "OUTPUT_DIR", folder),
        ]


def test_one_run_has_standard_deviation_0(train_net: TrainNet, argv: list[str]) -> None:
    assert main(["--runs", "1", *argv[2:]])["figures"]["bbox"]["AP"] == {"mean": 50.0, "std": 0.0}


def test_a_finished_run_is_not_repeated(train_net: TrainNet, argv: list[str], tmp_path: Path) -> None:
    train_net.codes[3] = 7
    with pytest.raises(ValueError, match="run 2 ended with code 7; correct the error above"):
        main(argv)
    assert train_net.seeds == [1, 2, 3] and not (tmp_path / "out" / "result.json").exists()
    train_net.codes.clear()
    main(argv)
    assert train_net.seeds == [1, 2, 3, 3]
    main(["--runs", "2", *argv[2:]])
    assert len(train_net.commands) == 4


def test_runs_of_other_settings_are_refused(train_net: TrainNet, argv: list[str], tmp_path: Path) -> None:
    main(argv)
    result = (tmp_path / "out" / "result.json").read_bytes()
    more = [*argv, "SOLVER.MAX_ITER", "9"]
    message = (
        r"runs of other settings: the arguments were .*weights\.pth', now .*SOLVER\.MAX_ITER 9'; use another"
    )
    with pytest.raises(ValueError, match=message):
        main(more)
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"settings: the file of MODEL.WEIGHTS has changed; use another OUTPUT_DIR"
    ):
        main(argv)
    with pytest.raises(ValueError, match=r"arguments were .*; the file of MODEL.WEIGHTS has changed; use"):
        main(more)
    assert len(train_net.commands) == 3 and (tmp_path / "out" / "result.json").read_bytes() == result
    (tmp_path / "weights.pth").write_bytes(b"some")
    main(argv)


def test_a_config_that_has_changed_is_noticed(
    train_net: TrainNet, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.yaml"
    base.write_text("VERSION: 2\n")
    (tmp_path / "c.yaml").write_text('_BASE_: "base.yaml"\n')
    main(argv)
    main(argv)
    base.write_text("VERSION: 2\nSEED: 1\n")
    with pytest.raises(ValueError, match="settings: the config's file has changed; use another OUTPUT_DIR"):
        main(argv)


def test_arguments_that_started_no_run_may_be_corrected(train_net: TrainNet, argv: list[str]) -> None:
    train_net.codes[1] = 2
    with pytest.raises(ValueError, match="run 0 ended with code 2"):
        main([*argv, "NO.SUCH", "1"])
    train_net.codes.clear()
    main(argv)
    with pytest.raises(ValueError, match="holds runs of other settings"):
        main([*argv, "NO.SUCH", "1"])


def test_a_null_figure_is_refused(train_net: TrainNet, argv: list[str]) -> None:
    train_net.figures = [FIGURES[0], (51.5, 81.0, None), FIGURES[2]]
    with pytest.raises(ValueError, match=r"run 1 has no AP75 of bbox, its result.json holds null"):
        main(argv)


def test_missing_arguments_are_refused(train_net: TrainNet, argv: list[str]) -> None:
    with pytest.raises(ValueError, match="--runs is not given"):
        main(argv[2:])
    with pytest.raises(ValueError, match="OUTPUT_DIR is not given"):
        main(argv[:-2])
    for number in ("0", "two"):
        with pytest.raises(ValueError, match=f"--runs is {number}; give a number of at least 1"):
            main(["--runs", number, *argv[2:]])
    assert not train_net.commands
