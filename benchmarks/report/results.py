"""The shapes of the benchmarks' JSON files, and their reading."""

from pathlib import Path
from typing import Any

from benchmarks.evidence import METHODS, RANDOM
from benchmarks.race import LIGHTLY, LIGHTLY_AT_BEST, MIXMASK
from benchmarks.race import OURS as OURS_IN_RACE
from benchmarks.ratios import GROUPS
from benchmarks.report.files import Some, check, read_json
from benchmarks.scale import MEASURES

Figures = dict[str, Any]
"""A JSON file of one of the shapes below."""
JPEG_SETS = ("reencoded", "pass_through")
OTHER_TABLES = ("raw", "scaling", "convert", "photometric")
RACERS = {OURS_IN_RACE: "", MIXMASK: "mixmask_", LIGHTLY: None, LIGHTLY_AT_BEST: None}
"""The runners of the race → what the keys of their ratios begin with, if they have ratios."""
CURVES = ("knn_top1", "loss", "loss_clean", "rankme")
"""What is drawn by epoch."""
_METHODS = (RANDOM, *METHODS)


def _of(shape: Any, keys: str) -> Figures:
    """Return the same shape for several keys."""
    return dict.fromkeys(keys.split(), shape)


_RATE = {
    **_of(float, "median low high"),
    **{"turns": [float], "configured?": str, "antialiased?": (bool, None), "bytes?": (int, None)},
    **_of((float, None), "mean_error? max_error?"),
}
_RATES, _RATIOS = {"*": _RATE}, {"*": (float, None)}
_ENVIRONMENT = {
    **_of(str, "processor python system"),
    **{"cores": int, "memory_gib": float, "gpu": (str, None), "versions": {"*": (str, None)}},
}
_COST = {**_RATE, "peak_memory_mib": float}
_EPOCH = {
    **{"arch": str, **_of(int, "crop_px pictures batch_size epochs"), **_of(float, "speedup speedup_one_bn")},
    "rows": Some({"*": {**_RATE, "split": _of(float, "data encoder loss")}}),
}
_RACER = {
    **{"configured": str, "spread": (_of(float, "samples_per_s knn_after"), None)},
    **_of(float, "samples_per_s samples knn_before knn_after knn_whole_before knn_whole_after"),
    "runs": Some([_of(float, "samples_per_s knn_before knn_after")]),
}
_RUN = {
    **_of(float, "knn_top1 linear_top1"),
    **{"samples_per_s?": (float, None), "curve": [{"epoch": int, **dict.fromkeys(CURVES, float)}]},
}
_METHOD = {**_of(_of(float, "mean std"), "knn_top1 linear_top1"), "runs": Some([_RUN])}

_SHAPES: dict[str, Figures] = {
    "loader": {
        **{"quick": bool, "config": {**_of(int, "threads batch_size crop_px turns"), "seconds?": float}},
        "sets": {"*": {"pictures": int, "mean_kb": float, "how": str, "bytes?": int}},
        "tables": {
            **{f"{name}?": _of(_RATES, "crops? recipe?") for name in JPEG_SETS},
            **{f"{name}?": _RATES for name in OTHER_TABLES},
        },
        **{"stages?": {"*": float}, "left_out?": {"*": {"*": str}}},
        **{f"{group}?": _RATIOS for group in GROUPS},
    },
    "half_hour": {
        **{"quick": bool, "images": _of(str, "how read_from"), "expected": {"*": [str]}},
        "config": {**_of(int, "crop_px batch_size queue_len"), **_of(str, "arch device")},
        "parts": {"*": {"*": {**_of(str, "reason? unit?"), **_of(float, "median? low? high?")}}},
    },
    "scale": {
        "config": _of(int, "threads batch_size crop_px repeats payloads"),
        "counts": Some({"*": {**dict.fromkeys(MEASURES, _RATE), "index_mib": float}}),
        "ratios": _RATIOS,
    },
    "step": {
        **{"quick": bool, "config": {**_of(int, "batch_size queue_len turns threads"), "arch": str}},
        "step": {
            "methods": Some(
                {"*": {**_of(_COST, "ours naive"), **_of(float, "time_vs_naive peak_memory_vs_naive")}}
            )
        },
        "epoch?": {"settings": [_EPOCH]},
    },
    "race": {
        **{"quick": bool, "config": {"seconds": float, "threads": int, "knn": {"bank": int}}},
        "race": {
            "runners": dict.fromkeys(RACERS, _RACER),
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
        "evidence": Some({f"{method}?": _METHOD for method in _METHODS}),
    },
    "demo": {
        **_of(float, "knn_top1_random knn_top1_mixmask linear_top1_random linear_top1_mixmask"),
        **{"data_wait_fraction": float, "seconds": float, "knn_k": int},
    },
}
"""Benchmarks, in the order of the page → the shape of their JSON."""
MEASURED_BY = {name: f"make {name}" for name in _SHAPES}
MEASURED_BY |= {"loader": "make bench", "half_hour": "make half-hour"}


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
    """Read the JSON of one benchmark, with its rows in the order of the page.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is of another shape; the message names the file and the key.
    """
    command = MEASURED_BY[name]
    figures = read_json(file, command)
    head = {} if name == "demo" else {"benchmark": name}
    check(figures, {**head, "environment": _ENVIRONMENT, **_SHAPES[name]}, file, command)
    if name == "loader":
        measured = [key for key in JPEG_SETS if key in figures["tables"]] or [" or ".join(JPEG_SETS)]
        check(figures, dict.fromkeys(("tables", "sets"), dict.fromkeys(measured, dict)), file, command)
    if name == "scale":
        figures["counts"] = {count: figures["counts"][count] for count in sorted(figures["counts"], key=int)}
    if name == "race":
        runners = figures["race"]["runners"]
        figures["race"]["runners"] = {runner: runners[runner] for runner in RACERS}
    if name == "evidence":
        methods = figures["evidence"]
        if unknown := methods.keys() - set(_METHODS):
            raise ValueError(
                f"{file}: evidence has {', '.join(unknown)}, expected some of {', '.join(_METHODS)}; "
                f"measure again: {command}"
            )
        figures["evidence"] = {method: methods[method] for method in _METHODS if method in methods}
    return figures
