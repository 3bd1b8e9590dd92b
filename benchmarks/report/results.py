"""The benchmarks' JSON files, read and checked; a file of another shape is refused with a sentence."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import OURS
from benchmarks.ratios import GROUPS
from benchmarks.report.files import Node, read_json
from benchmarks.scale import MEASURES

PICTURE_SETS = ("reencoded", "pass_through")
"""The two sets of photographs that peers are measured on."""
OTHER_TABLES = ("raw", "scaling", "convert", "photometric")


@dataclass(frozen=True)
class Rate:
    """What one peer did: items a second over interleaved turns."""

    name: str
    median: float
    low: float
    high: float
    turns: tuple[float, ...]
    antialiased: bool | None = None
    """None where it does not resample."""
    mean_error: float | None = None
    """Mean difference of its crops from PIL's, in grey levels; None where it makes none."""
    max_error: float | None = None
    """Greatest such difference."""
    configured: str = ""
    """How it was set up."""
    bytes: int | None = None
    """What its set takes on disk, where that was the question."""

    @property
    def is_ours(self) -> bool:
        """Whether this is our loader."""
        return OURS in self.name


Rates = Mapping[str, Rate]


@dataclass(frozen=True)
class LoaderFigures:
    """loader.json: our loader beside its peers."""

    quick: bool
    """A run too short for figures that are shown elsewhere."""
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    sets: Mapping[str, Mapping[str, Any]]
    """Name of a set → pictures, mean_kb, how it was made, bytes."""
    crops: Mapping[str, Rates]
    """Set → peers that make two crops of each picture. Here and below, what was not measured is empty."""
    recipe: Mapping[str, Rates]
    """Set → peers that do the whole MoCo v2 recipe."""
    raw: Rates
    scaling: Rates
    """Threads → our loader with as many."""
    convert: Rates
    photometric: Rates
    stages: Mapping[str, float]
    """Stage of our loader → microseconds per sample on one thread."""
    ratios: Mapping[str, Mapping[str, float | None]]
    """Table → what is compared → our rate over the other's; None where the other was not measured."""
    left_out: Mapping[str, Mapping[str, str]]
    """Work → peers that do not offer it → why."""


@dataclass(frozen=True)
class ScaleFigures:
    """scale.json: what the size of a set costs."""

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    counts: Mapping[int, Mapping[str, Rate]]
    """Pictures → measure → its turns, in the measure's unit."""
    index_mib: Mapping[int, float]
    ratios: Mapping[str, float | None]
    """Measure → largest set over smallest."""


def read_loader(file: Path) -> LoaderFigures:
    """Read loader.json.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not of this shape; the sentence names file and key.
    """
    content = Node.read(file, "make bench", "loader")
    tables, config, sets = content.at("tables"), content.at("config"), content.at("sets")
    for key in ("threads", "batch_size", "crop_px", "turns"):
        config.get(key, int)
    by_set = {name: tables.at(name) for name in PICTURE_SETS if name in tables.value}
    if not by_set:
        raise tables.error(f"there is neither of {' and '.join(PICTURE_SETS)}")
    for name in by_set:
        _check_photographs(sets.at(name))
    stages, reasons = content.if_there("stages"), content.if_there("left_out")
    return LoaderFigures(
        quick=content.get("quick", bool),
        config=config.value,
        environment=content.environment(),
        sets=sets.value,
        crops={name: _rates(table.if_there("crops")) for name, table in by_set.items()},
        recipe={name: _rates(table.if_there("recipe")) for name, table in by_set.items()},
        **{name: _rates(tables.if_there(name)) for name in OTHER_TABLES},
        stages={name: stages.get(name, float) for name in stages.value},
        ratios={name: content.if_there(name).ratios() for name in GROUPS},
        left_out={
            work: {name: reasons.at(work).get(name, str) for name in reasons.at(work).value}
            for work in reasons.value
        },
    )


def read_scale(file: Path) -> ScaleFigures:
    """Read scale.json; raises like :func:`read_loader`."""
    content = Node.read(file, "make scale", "scale")
    counts = content.at("counts")
    config = content.at("config")
    for key in ("threads", "batch_size", "crop_px", "repeats", "payloads"):
        config.get(key, int)
    return ScaleFigures(
        config=config.value,
        environment=content.environment(),
        counts={
            int(count): {name: rate_of(name, counts.at(count).at(name)) for name in MEASURES}
            for count in sorted(counts.value, key=int)
        },
        index_mib={
            int(count): counts.at(count).get("index_mib", float) for count in sorted(counts.value, key=int)
        },
        ratios=content.at("ratios").ratios(),
    )


@dataclass(frozen=True)
class DemoFigures:
    """summary.json of a demo: accuracies of a frozen encoder in [0, 1]."""

    knn_top1_random: float
    knn_top1_mixmask: float
    linear_top1_random: float
    linear_top1_mixmask: float
    data_wait_fraction: float
    """Share of the pretraining that waited for data."""
    knn_k: int
    seconds: float
    """The whole demo."""
    environment: Mapping[str, Any]


def read_demo(file: Path) -> DemoFigures:
    """Read a demo's summary.json; raises like :func:`read_loader`."""
    content = Node(read_json(file, "make demo"), str(file), "make demo")
    numbers = {
        field.name: content.get(field.name, float)
        for field in dataclasses.fields(DemoFigures)
        if field.name not in ("knn_k", "environment")
    }
    return DemoFigures(**numbers, knn_k=content.get("knn_k", int), environment=content.environment())


def _check_photographs(facts: Node) -> None:
    """What pages say of a set of photographs."""
    facts.get("pictures", int)
    facts.get("mean_kb", float)
    facts.get("how", str)


def _rates(table: Node) -> Rates:
    return {name: rate_of(name, table.at(name)) for name in table.value}


def rate_of(name: str, row: Node) -> Rate:
    """A row of a table; raises ValueError where a figure is missing."""
    optional = {key: row.value[key] for key in _OPTIONAL if row.value.get(key) is not None}
    median, low, high = (row.get(key, float) for key in ("median", "low", "high"))
    return Rate(name, median, low, high, tuple(row.get("turns", list)), **optional)


_OPTIONAL = ("antialiased", "mean_error", "max_error", "configured", "bytes")
