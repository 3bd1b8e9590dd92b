"""step.json, race.json and evidence.json, read and checked: what training costs and what it gives."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.epoch import OURS, OURS_ONE_BN, PLAIN
from benchmarks.evidence import METHODS, PROBES, RANDOM
from benchmarks.race import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK
from benchmarks.race import OURS as OURS_IN_RACE
from benchmarks.report.files import Node
from benchmarks.report.results import Rate

EPOCH_ROWS = (PLAIN, OURS, OURS_ONE_BN)
EPOCH_PARTS = ("data", "encoder", "loss")
RACE_RATIOS = {OURS_IN_RACE: "", MIXMASK: "mixmask_"}
"""Our runners → what their ratios' keys begin with."""
CURVES = ("knn_top1", "loss", "loss_clean", "rankme")
"""What is drawn by epoch."""
_FORMULATIONS = ("ours", "naive")


@dataclass(frozen=True)
class Cost:
    """What a step takes in one formulation."""

    time_ms: Rate
    peak_memory_mib: float


@dataclass(frozen=True)
class MethodStep:
    """A step of one method without its encoders."""

    ours: Cost
    naive: Cost
    time_vs_naive: float
    peak_memory_vs_naive: float


@dataclass(frozen=True)
class EpochRow:
    """Epochs of one recipe."""

    seconds: Rate
    split: Mapping[str, float]
    """Part → seconds of an epoch."""


@dataclass(frozen=True)
class EpochFigures:
    """Whole epochs of one encoder, ours beside the published recipe."""

    arch: str
    crop_px: int
    pictures: int
    batch_size: int
    epochs: int
    rows: Mapping[str, EpochRow]
    speedup: float
    speedup_one_bn: float
    """The same with BN as it is published."""


@dataclass(frozen=True)
class StepFigures:
    """step.json: training steps and epochs beside the published formulation."""

    quick: bool
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    methods: Mapping[str, MethodStep]
    epochs: Sequence[EpochFigures]
    """The one that is told first in front; empty where they were not measured."""


@dataclass(frozen=True)
class Racer:
    """A runner of the race; kNN as a share in [0, 1]."""

    name: str
    configured: str
    rates: Sequence[float]
    """Samples/s, …"""
    knn_before: Sequence[float]
    knn_after: Sequence[float]
    """… and kNN of each seed."""
    mean: Mapping[str, float]
    """samples_per_s, samples, knn_before, knn_after and the last two of the whole bank → mean over seeds."""
    spread: Mapping[str, float]
    """samples_per_s and knn_after → their standard deviation; empty for a single seed."""

    @property
    def is_ours(self) -> bool:
        """Whether this is our loop."""
        return self.name in RACE_RATIOS


@dataclass(frozen=True)
class RaceFigures:
    """race.json: ours against lightly for the same wall time."""

    quick: bool
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    racers: Mapping[str, Racer]
    speed: Mapping[str, float]
    """Our runner → its samples/s over lightly's as documented, …"""
    speed_at_best: Mapping[str, float]
    """… and over lightly's at its best."""
    gain: Mapping[str, float]
    """Our runner → points of kNN over lightly's as documented, …"""
    gain_at_best: Mapping[str, float]
    """… and over lightly's at its best."""


@dataclass(frozen=True)
class Probe:
    """Mean and standard deviation of a top-1 over runs, as shares in [0, 1], and that of each run."""

    mean: float
    std: float
    runs: Sequence[float]


@dataclass(frozen=True)
class MethodEvidence:
    """What the runs of one method gave."""

    probes: Mapping[str, Probe]
    rates: Sequence[float]
    """Samples/s of its pretrainings; empty for an encoder that was not trained."""
    curves: Mapping[str, Sequence[Mapping[int, float]]]
    """Measure → for each run, epoch → value."""
    num_runs: int


@dataclass(frozen=True)
class EvidenceFigures:
    """evidence.json: every method pretrained and probed."""

    quick: bool
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    methods: Mapping[str, MethodEvidence]


@dataclass(frozen=True)
class TrainingFigures:
    """Those of the three files that are there."""

    step: StepFigures | None = None
    race: RaceFigures | None = None
    evidence: EvidenceFigures | None = None

    def __iter__(self) -> Iterator[StepFigures | RaceFigures | EvidenceFigures]:
        return (figures for figures in (self.step, self.race, self.evidence) if figures)

    def full(self) -> "TrainingFigures":
        """Without the figures of quick runs."""
        quick = {name: None for name, figures in vars(self).items() if figures and figures.quick}
        return dataclasses.replace(self, **quick)


def read_training(folder: Path) -> TrainingFigures:
    """Read what is there of step.json, race.json and evidence.json.

    Raises:
        ValueError: if one is of another shape; the sentence names file and key.
    """
    step, race, evidence = (folder / f"{name}.json" for name in ("step", "race", "evidence"))
    return TrainingFigures(
        read_step(step) if step.is_file() else None,
        read_race(race) if race.is_file() else None,
        read_evidence(evidence) if evidence.is_file() else None,
    )


def read_step(file: Path) -> StepFigures:
    """Read step.json; raises ValueError if it is of another shape."""
    content = Node.read(file, "make step", "step")
    config, methods = content.at("config"), content.at("step").at("methods")
    for key in ("batch_size", "queue_len", "turns", "threads"):
        config.get(key, int)
    config.get("arch", str)
    if not methods.value:
        raise methods.error("there is no method")
    return StepFigures(
        content.get("quick", bool),
        config.value,
        content.environment(),
        {name: _method_step(methods.at(name)) for name in methods.value},
        [_epoch(row) for row in content.at("epoch").rows("settings")] if "epoch" in content.value else [],
    )


def _method_step(node: Node) -> MethodStep:
    ours, naive = (
        Cost(_timed(name, node.at(name)), node.at(name).get("peak_memory_mib", float))
        for name in _FORMULATIONS
    )
    return MethodStep(ours, naive, node.get("time_vs_naive", float), node.get("peak_memory_vs_naive", float))


def _timed(name: str, node: Node) -> Rate:
    median, low, high = (node.get(key, float) for key in ("median", "low", "high"))
    return Rate(name, median, low, high, tuple(node.get("turns", list)))


def _epoch(setting: Node) -> EpochFigures:
    table = setting.at("rows")
    rows = {
        name: EpochRow(
            _timed(name, table.at(name)),
            {part: table.at(name).at("split").get(part, float) for part in EPOCH_PARTS},
        )
        for name in EPOCH_ROWS
    }
    crop_px, pictures, batch_size, epochs = (
        setting.get(key, int) for key in ("crop_px", "pictures", "batch_size", "epochs")
    )
    speedup, speedup_one_bn = (setting.get(key, float) for key in ("speedup", "speedup_one_bn"))
    return EpochFigures(
        setting.get("arch", str), crop_px, pictures, batch_size, epochs, rows, speedup, speedup_one_bn
    )


def read_race(file: Path) -> RaceFigures:
    """Read race.json; raises ValueError if it is of another shape."""
    content = Node.read(file, "make race", "race")
    race, config = content.at("race"), content.at("config")
    config.get("seconds", float)
    config.get("threads", int)
    config.at("knn").get("bank", int)
    runners = race.at("runners")
    return RaceFigures(
        content.get("quick", bool),
        config.value,
        content.environment(),
        {name: _racer(name, runners.at(name)) for name in (*RACE_RATIOS, LIGHTLY, LIGHTLY_AT_BEST)},
        *(
            {name: race.get(f"{prefix}{key}", float) for name, prefix in RACE_RATIOS.items()}
            for key in (
                *("samples_per_s_vs_lightly", "samples_per_s_vs_lightly_at_best"),
                *("knn_gain_over_lightly", "knn_gain_over_lightly_at_best"),
            )
        ),
    )


def _racer(name: str, node: Node) -> Racer:
    runs = _some_runs(node)
    rates, before, after = (
        [run.get(key, float) for run in runs] for key in ("samples_per_s", "knn_before", "knn_after")
    )
    kinds = [f"{kind}_{when}" for kind in ("knn", "knn_whole") for when in ("before", "after")]
    mean = {key: node.get(key, float) for key in ("samples_per_s", "samples", *kinds)}
    spread = {}
    if len(runs) > 1:
        spread = {key: node.at("spread").get(key, float) for key in ("samples_per_s", "knn_after")}
    return Racer(name, node.get("configured", str), rates, before, after, mean, spread)


def read_evidence(file: Path) -> EvidenceFigures:
    """Read evidence.json; raises ValueError if it is of another shape."""
    content = Node.read(file, "make evidence", "evidence")
    evidence, config = content.at("evidence"), content.at("config")
    for key in ("epochs", "pictures"):
        config.get(key, int)
    known = (RANDOM, *METHODS)
    if not evidence.value or (unknown := set(evidence.value) - set(known)):
        told = f"of {', '.join(sorted(unknown))}" if evidence.value else "of no method"
        raise evidence.error(f"figures {told}, expected some of {', '.join(known)}")
    return EvidenceFigures(
        "quick" in content.value and content.get("quick", bool),
        config.value,
        content.environment(),
        {name: _method_evidence(evidence.at(name)) for name in known if name in evidence.value},
    )


def _method_evidence(node: Node) -> MethodEvidence:
    runs = _some_runs(node)
    curves = [run.rows("curve") for run in runs]
    rates = [run.get("samples_per_s", float) for run in runs if run.value.get("samples_per_s") is not None]
    return MethodEvidence(
        {
            name: Probe(
                node.at(name).get("mean", float),
                node.at(name).get("std", float),
                [run.get(name, float) for run in runs],
            )
            for name in PROBES
        },
        rates,
        {
            name: [
                {row.get("epoch", int): row.get(name, float) for row in curve} for curve in curves if curve
            ]
            for name in CURVES
        },
        len(runs),
    )


def _some_runs(node: Node) -> list[Node]:
    if not (runs := node.rows("runs")):
        raise node.error("runs is empty")
    return runs
