"""The benchmarks' JSON files, read and checked; a file of another shape is refused with a sentence."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.peers.contract import OURS, WORKS
from benchmarks.ratios import GROUPS, MAIN_SET
from benchmarks.scale import MEASURES

PICTURE_SETS = ("reencoded", "pass_through")
"""The two sets of photographs that peers are measured on."""
OTHER_TABLES = ("raw", "scaling", "convert", "photometric")
_T = TypeVar("_T")


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
    cpu_share: float | None = None
    """Share of the host's cores that it kept busy, where a GPU does part of the work."""
    torch_mib: float | None = None
    """Greatest amount of a GPU's memory in torch's tensors, …"""
    gpu_mib: float | None = None
    """… and by how much the GPU's free memory fell in all."""

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
class GPUFigures:
    """gpu.json: loaders whose batches are wanted on a GPU."""

    quick: bool
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    sets: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Rates]
    """Work → loaders; a work that was not measured is absent."""


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
    content = _Node.read(file, "make bench", "loader")
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
        environment=_environment(content),
        sets=sets.value,
        crops={name: table.if_there("crops").rates() for name, table in by_set.items()},
        recipe={name: table.if_there("recipe").rates() for name, table in by_set.items()},
        **{name: tables.if_there(name).rates() for name in OTHER_TABLES},
        stages={name: stages.get(name, float) for name in stages.value},
        ratios={name: content.if_there(name).ratios() for name in GROUPS},
        left_out={
            work: {name: reasons.at(work).get(name, str) for name in reasons.at(work).value}
            for work in reasons.value
        },
    )


def read_gpu(file: Path) -> GPUFigures:
    """Read gpu.json; raises like :func:`read_loader`."""
    content = _Node.read(file, "make bench-gpu", "gpu")
    config, tables = content.at("config"), content.at("tables")
    for key in ("threads", "batch_size", "crop_px", "turns"):
        config.get(key, int)
    _check_photographs(content.at("sets").at(MAIN_SET))
    for work in tables.value:
        for name in tables.at(work).value:
            for key in ("cpu_share", "torch_mib", "gpu_mib"):
                tables.at(work).at(name).get(key, float)
    content.at("environment").get("gpu", str)
    return GPUFigures(
        quick=content.get("quick", bool),
        config=config.value,
        environment=_environment(content),
        sets=content.at("sets").value,
        tables={work: tables.at(work).rates() for work in WORKS if work in tables.value},
    )


def read_scale(file: Path) -> ScaleFigures:
    """Read scale.json; raises like :func:`read_loader`."""
    content = _Node.read(file, "make scale", "scale")
    counts = content.at("counts")
    config = content.at("config")
    for key in ("threads", "batch_size", "crop_px", "repeats", "payloads"):
        config.get(key, int)
    return ScaleFigures(
        config=config.value,
        environment=_environment(content),
        counts={
            int(count): {name: counts.at(count).at(name).rate(name) for name in MEASURES}
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
    content = _Node(read_json(file, "make demo"), str(file), "make demo")
    numbers = {
        field.name: content.get(field.name, float)
        for field in dataclasses.fields(DemoFigures)
        if field.name not in ("knn_k", "environment")
    }
    return DemoFigures(**numbers, knn_k=content.get("knn_k", int), environment=_environment(content))


def read_json(file: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object; ``mend`` is the command that makes the file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {file}; make it: {mend}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); make it again: {mend}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; make it again: {mend}")
    return content


def _check_photographs(facts: "_Node") -> None:
    """What pages say of a set of photographs."""
    facts.get("pictures", int)
    facts.get("mean_kb", float)
    facts.get("how", str)


def _environment(content: "_Node") -> Mapping[str, Any]:
    environment = content.at("environment")
    for key in ("processor", "python", "system"):
        environment.get(key, str)
    environment.get("cores", int)
    environment.get("memory_gib", float)
    environment.at("versions")
    if "gpu" not in environment.value:
        raise environment.error("gpu is missing")
    return environment.value


@dataclass(frozen=True)
class _Node:
    """An object within a JSON file that knows where it stands, for the sentence of an error."""

    value: Mapping[str, Any]
    where: str
    """The file and the keys down to here."""
    mend: str

    @staticmethod
    def read(file: Path, mend: str, benchmark: str) -> "_Node":
        node = _Node(read_json(file, mend), str(file), mend)
        if (found := node.get("benchmark", str)) != benchmark:
            raise node.error(f"benchmark is {found!r}, expected {benchmark!r}")
        return node

    def error(self, what: str) -> ValueError:
        return ValueError(
            f"{self.where}: {what}; the file is of an older program or of another one, "
            f"measure again: {self.mend}"
        )

    def get(self, key: str, kind: type[_T]) -> _T:
        """The value under ``key``, which must be of ``kind``; an integer is a float too."""
        if key not in self.value:
            raise self.error(f"{key} is missing")
        value = self.value[key]
        number = kind is float and isinstance(value, int)
        if not (isinstance(value, kind) or number) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{key} is {value!r}, expected {kind.__name__}")
        return value  # type: ignore[no-any-return]

    def at(self, key: str) -> "_Node":
        """The object under ``key``."""
        value: dict[str, Any] = self.get(key, dict)
        return _Node(value, f"{self.where}: {key}", self.mend)

    def if_there(self, key: str) -> "_Node":
        """The object under ``key``, an empty one where there is none."""
        return self.at(key) if key in self.value else _Node({}, f"{self.where}: {key}", self.mend)

    def rates(self) -> Rates:
        """All entries as rates."""
        return {name: self.at(name).rate(name) for name in self.value}

    def rate(self, name: str) -> Rate:
        """This object as a rate."""
        optional = {key: self.value[key] for key in _OPTIONAL if self.value.get(key) is not None}
        median, low, high = (self.get(key, float) for key in ("median", "low", "high"))
        return Rate(name, median, low, high, tuple(self.get("turns", list)), **optional)

    def ratios(self) -> dict[str, float | None]:
        """All entries as numbers or None."""
        return {key: None if value is None else self.get(key, float) for key, value in self.value.items()}


_OPTIONAL = (
    *("antialiased", "mean_error", "max_error", "configured", "bytes"),
    *("cpu_share", "torch_mib", "gpu_mib"),
)
