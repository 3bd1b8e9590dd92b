"""The shapes of the benchmarks' JSON files, and their reading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence import METHODS, RANDOM
from benchmarks.half_hour.figures import COMMAND
from benchmarks.race_figures import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK
from benchmarks.race_figures import OURS as OURS_IN_RACE
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

_RATE = {
    "median": float,
    "low": float,
    "high": float,
    "turns": Each(float, list),
    "configured?": str,
    "antialiased?": (bool, None),
    "mean_error?": (float, None),
    "max_error?": (float, None),
    "bytes?": (int, None),
}
_RATES = Each(_RATE)
_RATIOS = Each((float, None))
_ENVIRONMENT = {
    "processor": str,
    "cores": int,
    "memory_gib": float,
    "gpu": (str, None),
    "python": str,
    "system": str,
    "versions": Each((str, None)),
}
_TOP1 = {"knn_top1": float, "linear_top1": float}
_MEAN = {"mean": float, "std": float}
_COST = {**_RATE, "peak_memory_mib": float}

_LOADER = {
    "benchmark": "loader",
    "quick": bool,
    "config": {"threads": int, "batch_size": int, "crop_px": int, "turns": int, "seconds?": float},
    "environment": _ENVIRONMENT,
    "sets": Each({"pictures": int, "mean_kb": float, "how": str, "bytes?": int}),
    "tables": {
        **{f"{name}?": {"crops?": _RATES, "recipe?": _RATES} for name in JPEG_SETS},
        **{f"{name}?": _RATES for name in OTHER_TABLES},
    },
    "stages?": Each(float),
    "left_out?": Each(Each(str)),
    **{f"{group}?": _RATIOS for group in GROUPS},
}
_SCALE = {
    "benchmark": "scale",
    "config": {"threads": int, "batch_size": int, "crop_px": int, "repeats": int, "payloads": int},
    "environment": _ENVIRONMENT,
    "counts": Each({**dict.fromkeys(MEASURES, _RATE), "index_mib": float}, some=True),
    "ratios": _RATIOS,
}
_STEP = {
    "benchmark": "step",
    "quick": bool,
    "config": {"batch_size": int, "queue_len": int, "turns": int, "threads": int, "arch": str},
    "environment": _ENVIRONMENT,
    "step": {
        "methods": Each(
            {"ours": _COST, "naive": _COST, "time_vs_naive": float, "peak_memory_vs_naive": float}, some=True
        )
    },
    "epoch?": {
        "settings": Each(
            {
                **{"arch": str, "crop_px": int, "pictures": int, "batch_size": int, "epochs": int},
                "rows": Each({**_RATE, "split": {"data": float, "encoder": float, "loss": float}}, some=True),
                **{"speedup": float, "speedup_one_bn": float},
            },
            list,
        )
    },
}
_KNN = dict.fromkeys(("knn_before", "knn_after", "knn_whole_before", "knn_whole_after"), float)
_RACER_RUN = {"samples_per_s": float, "knn_before": float, "knn_after": float}
_RACE = {
    "benchmark": "race",
    "quick": bool,
    "config": {"seconds": float, "threads": int, "knn": {"bank": int}},
    "environment": _ENVIRONMENT,
    "race": {
        "runners": Each(
            {
                **{"configured": str, "samples_per_s": float, "samples": float, **_KNN},
                "spread": ({"samples_per_s": float, "knn_after": float}, None),
                "runs": Each(_RACER_RUN, list, some=True),
            },
            needed=tuple(RACERS),
        ),
        **{
            f"{prefix}{key}{peer}": float
            for prefix in ("", "mixmask_")
            for key in ("samples_per_s_vs_lightly", "knn_gain_over_lightly")
            for peer in ("", "_at_best")
        },
    },
}
_EVIDENCE = {
    "benchmark": "evidence",
    "quick?": bool,
    "config": {"epochs": int, "pictures": int},
    "environment": _ENVIRONMENT,
    "evidence": Each(
        {
            **dict.fromkeys(_TOP1, _MEAN),
            "runs": Each(
                {
                    **_TOP1,
                    "samples_per_s?": (float, None),
                    "curve": Each({"epoch": int, **dict.fromkeys(CURVES, float)}, list),
                },
                list,
                some=True,
            ),
        },
        some=True,
        known=(RANDOM, *METHODS),
    ),
}
_HALF_HOUR = {
    "benchmark": "half_hour",
    "quick": bool,
    "config": {"crop_px": int, "batch_size": int, "queue_len": int, "arch": str, "device": str},
    "environment": _ENVIRONMENT,
    "images": {"how": str, "read_from": str},
    "expected": Each(Each(str, list)),
    "parts": Each(Each({f"{key}?": shape for key, shape in _RATE.items()} | {"unit?": str, "reason?": str})),
}
_DEMO = {
    **dict.fromkeys(
        ("knn_top1_random", "knn_top1_mixmask", "linear_top1_random", "linear_top1_mixmask"), float
    ),
    **{"data_wait_fraction": float, "knn_k": int, "seconds": float, "environment": _ENVIRONMENT},
}
_SHAPES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "loader": (_LOADER, "make bench"),
    "half_hour": (_HALF_HOUR, COMMAND),
    "scale": (_SCALE, "make scale"),
    "step": (_STEP, "make step"),
    "race": (_RACE, "make race"),
    "evidence": (_EVIDENCE, "make evidence"),
    "demo": (_DEMO, "make demo"),
}
"""Benchmarks, in the order of the page, with the shape of their JSON and the command that writes it."""


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
    shape, command = _SHAPES[name]
    figures = read_checked(file, shape, command)
    if name == "loader":
        measured = [key for key in JPEG_SETS if key in figures["tables"]]
        tables = dict if measured else {" or ".join(JPEG_SETS): dict}
        read_checked(file, {"tables": tables, "sets": Each(dict, needed=tuple(measured))}, command)
    if name == "scale":
        figures["counts"] = {count: figures["counts"][count] for count in sorted(figures["counts"], key=int)}
    if name == "evidence":
        methods = [method for method in (RANDOM, *METHODS) if method in figures[name]]
        figures[name] = {method: figures[name][method] for method in methods}
    return figures


def command_of(name: str) -> str:
    """Return the command that writes the JSON of a benchmark."""
    return _SHAPES[name][1]
