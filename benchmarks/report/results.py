"""The shapes of the benchmarks' JSON files, and their reading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence import METHODS, RANDOM
from benchmarks.half_hour.figures import COMMAND
from benchmarks.race import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK
from benchmarks.race import OURS as OURS_IN_RACE
from benchmarks.ratios import GROUPS
from benchmarks.report.files import Each, read_checked
from benchmarks.scale import MEASURES

Figures = dict[str, Any]
"""A JSON file of one of the shapes below."""
JPEG_SETS = ("reencoded", "pass_through")
OTHER_TABLES = ("raw", "scaling", "convert", "photometric")
RACERS = {OURS_IN_RACE: "", MIXMASK: "mixmask_", LIGHTLY: None, LIGHTLY_AT_BEST: None}
"""The runners of the race → what the keys of their ratios begin with, if they have ratios."""
CURVES = ("knn_top1", "loss", "loss_clean", "rankme")
"""What is drawn by epoch."""


def _of(shape: Any, keys: str) -> dict[str, Any]:
    """Return the same shape for several keys."""
    return dict.fromkeys(keys.split(), shape)


_RATE = {
    **_of(float, "median low high"),
    **{"turns": Each(float, list), "configured?": str, "antialiased?": (bool, None), "bytes?": (int, None)},
    **_of((float, None), "mean_error? max_error?"),
}
_RATES, _RATIOS = Each(_RATE), Each((float, None))
_ENVIRONMENT = {
    **_of(str, "processor python system"),
    **{"cores": int, "memory_gib": float, "gpu": (str, None), "versions": Each((str, None))},
}
_COST = {**_RATE, "peak_memory_mib": float}
_EPOCH = {
    **{"arch": str, **_of(int, "crop_px pictures batch_size epochs")},
    "rows": Each({**_RATE, "split": _of(float, "data encoder loss")}, some=True),
    **_of(float, "speedup speedup_one_bn"),
}
_RACER = {
    **{"configured": str, **_of(float, "samples_per_s samples")},
    **_of(float, "knn_before knn_after knn_whole_before knn_whole_after"),
    "spread": (_of(float, "samples_per_s knn_after"), None),
    "runs": Each(_of(float, "samples_per_s knn_before knn_after"), list, some=True),
}
_RUN = {
    **_of(float, "knn_top1 linear_top1"),
    **{"samples_per_s?": (float, None), "curve": Each({"epoch": int, **dict.fromkeys(CURVES, float)}, list)},
}
_METHOD = {
    **_of(_of(float, "mean std"), "knn_top1 linear_top1"),
    "runs": Each(_RUN, list, some=True),
}

_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "loader": {
        "quick": bool,
        "config": {**_of(int, "threads batch_size crop_px turns"), "seconds?": float},
        "sets": Each({"pictures": int, "mean_kb": float, "how": str, "bytes?": int}),
        "tables": {
            **{f"{name}?": _of(_RATES, "crops? recipe?") for name in JPEG_SETS},
            **{f"{name}?": _RATES for name in OTHER_TABLES},
        },
        **{"stages?": Each(float), "left_out?": Each(Each(str))},
        **{f"{group}?": _RATIOS for group in GROUPS},
    },
    "half_hour": {
        "quick": bool,
        "config": {**_of(int, "crop_px batch_size queue_len"), **_of(str, "arch device")},
        "images": _of(str, "how read_from"),
        "expected": Each(Each(str, list)),
        "parts": Each(Each({"reason?": str})),
    },
    "scale": {
        "config": _of(int, "threads batch_size crop_px repeats payloads"),
        "counts": Each({**dict.fromkeys(MEASURES, _RATE), "index_mib": float}, some=True),
        "ratios": _RATIOS,
    },
    "step": {
        "quick": bool,
        "config": {**_of(int, "batch_size queue_len turns threads"), "arch": str},
        "step": {
            "methods": Each(
                {**_of(_COST, "ours naive"), **_of(float, "time_vs_naive peak_memory_vs_naive")},
                some=True,
            )
        },
        "epoch?": {"settings": Each(_EPOCH, list)},
    },
    "race": {
        "quick": bool,
        "config": {"seconds": float, "threads": int, "knn": {"bank": int}},
        "race": {
            "runners": Each(_RACER, needed=tuple(RACERS)),
            **{
                f"{prefix}{key}{peer}": float
                for prefix in RACERS.values()
                for key in ("samples_per_s_vs_lightly", "knn_gain_over_lightly")
                for peer in ("", "_at_best")
                if prefix is not None
            },
        },
    },
    "evidence": {
        **{"quick?": bool, "config": _of(int, "epochs pictures")},
        "evidence": Each(_METHOD, some=True, known=(RANDOM, *METHODS)),
    },
    "demo": {
        **_of(float, "knn_top1_random knn_top1_mixmask linear_top1_random linear_top1_mixmask"),
        **{"data_wait_fraction": float, "seconds": float, "knn_k": int},
    },
}
"""Benchmarks, in the order of the page → the shape of their JSON."""
_COMMANDS = {"loader": "make bench", "half_hour": COMMAND}


def read_results(folder: Path, demo: Path | None = None) -> dict[str, Figures]:
    """Read the benchmarks' files in ``folder`` and the summary in the folder ``demo``, those that exist.

    Raises:
        ValueError: if a file is of another shape; the message names the file and the key.
    """
    files = {name: folder / f"{name}.json" for name in _SHAPES if name != "demo"}
    if demo:
        files["demo"] = demo / "summary.json"
    return {name: read_figures(file, name) for name, file in files.items() if file.is_file()}


def read_figures(file: Path, name: str) -> Figures:
    """Read the JSON of one benchmark.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is of another shape; the message names the file and the key.
    """
    command = command_of(name)
    head = {} if name == "demo" else {"benchmark": name}
    figures = read_checked(file, {**head, "environment": _ENVIRONMENT, **_SHAPES[name]}, command)
    if name == "loader":
        measured = [key for key in JPEG_SETS if key in figures["tables"]]
        tables = dict if measured else {" or ".join(JPEG_SETS): dict}
        read_checked(file, {"tables": tables, "sets": Each(dict, needed=tuple(measured))}, command)
    if name == "half_hour":
        rate = {**_RATE, "unit": str}
        parts = {
            part: {row: rate for row, found in rows.items() if "median" in found}
            for part, rows in figures["parts"].items()
        }
        read_checked(file, {"parts": parts}, command)
    if name == "scale":
        figures["counts"] = {count: figures["counts"][count] for count in sorted(figures["counts"], key=int)}
    if name == "race":
        runners = figures[name]["runners"]
        figures[name]["runners"] = {runner: runners[runner] for runner in RACERS}
    if name == "evidence":
        methods = [method for method in (RANDOM, *METHODS) if method in figures[name]]
        figures[name] = {method: figures[name][method] for method in methods}
    return figures


def command_of(name: str) -> str:
    """Return the command that writes the JSON of a benchmark."""
    return _COMMANDS.get(name, f"make {name}")
