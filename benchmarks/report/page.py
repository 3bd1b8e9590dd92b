"""The page: figures arranged in sections, which page.html draws."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from benchmarks.half_hour.figures import FACTS, facts_in_words, missing_rows
from benchmarks.half_hour.plan import published_name
from benchmarks.peers.contract import DECODE_LIMIT
from benchmarks.ratios import GROUPS, WORDS
from benchmarks.report import charts
from benchmarks.report.charts import Points, bars, points, svg
from benchmarks.report.formats import FILTERS, mebibytes, megabytes, number, percent, seconds, times
from benchmarks.report.results import CURVES, JPEG_SETS, OTHER_TABLES, RACERS, Figures
from benchmarks.scale import MEASURES

_NAMES = {
    **{"loader": "Loaders", "half_hour": "GPU", "scale": "Size of the set", "step": "Steps and epochs"},
    **{"race": "Race", "evidence": "Evidence", "demo": "Demo"},
}
"""The benchmarks in the list of machines."""
_PEERS = ("published", "torchvision", "DALI GPU")
"""In the names of rows that are not ours."""


def templates() -> jinja2.Environment:
    """Return the templates of this folder, with the formats as filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**FILTERS, "top1": top1, "samples_per_s": samples_per_s, "machine": machine}
    return environment


def render(results: Mapping[str, Figures]) -> str:
    """Return the whole page as HTML that needs no network."""
    machines: dict[str, list[str]] = {}
    for name, figures in results.items():
        machines.setdefault(json.dumps(figures["environment"]), []).append(_NAMES[name])
    known = {
        "views": {name: view(results[name]) for name, view in _VIEWS.items() if name in results},
        "machines": [(", ".join(names), json.loads(where)) for where, names in machines.items()],
        "colours": charts.COLOURS,
        "limit": DECODE_LIMIT,
    }
    return templates().get_template("page.html").render({name: results.get(name) for name in _NAMES} | known)


def _loader_view(loader: Figures) -> Figures:
    tables = loader["tables"]
    scaling, raw = tables.get("scaling", {}), tables.get("raw", {})
    one_thread = scaling.get("1", {}).get("median")
    named = {
        group: {WORDS.get(key, key.replace("_", " ")): value for key, value in loader[group].items()}
        for group in GROUPS
        if loader.get(group)
    }
    return {
        "ratios": {
            group: bars({name: value for name, value in found.items() if value is not None}, times, ours=True)
            for group, found in named.items()
        },
        "missing": {
            group: [name for name, value in found.items() if value is None] for group, found in named.items()
        },
        "works": {
            work: {name: bars(tables[name][work]) for name in JPEG_SETS if tables.get(name, {}).get(work)}
            for work in ("crops", "recipe")
        },
        **{part: bars(tables.get(part, {})) for part in OTHER_TABLES},
        "scaling": [
            replace(bar, mark=one_thread and one_thread * int(bar.name)) for bar in bars(scaling, ours=True)
        ],
        "raw": [
            replace(bar, cells=(megabytes(size) if (size := raw[bar.name].get("bytes")) else "–",))
            for bar in bars(raw)
        ],
    }


def _scale_view(scale: Figures) -> Figures:
    """Return bars of each measure by the number of images."""
    return {
        measure: bars(
            {f"{int(count):,}": found[measure] for count, found in scale["counts"].items()},
            seconds if unit == "s" else mebibytes,
            ours=True,
        )
        for measure, (_, unit) in MEASURES.items()
    } | {"measures": MEASURES}


def half_hour_view(half_hour: Figures) -> Figures:
    """Return what was measured of each part, and what was not."""
    parts = {}
    for part, missing in missing_rows(half_hour).items():
        found = half_hour["parts"].get(part, {})
        rows = {name: dict(found[name]) for name in half_hour["expected"][part] if name not in missing}
        by_reason: dict[str, list[str]] = {}
        for name in missing:
            by_reason.setdefault(found.get(name, {}).get("reason", "no time was left"), []).append(name)
        parts[part] = {**_measured(part, rows), "rows": rows, "missing": by_reason}
    return {"parts": parts}


def _measured(part: str, rows: dict[str, Figures]) -> Figures:
    """Return bars of the rates by unit, and all other facts by heading."""
    rates: dict[str, dict[str, Figures]] = {}
    for name, row in rows.items():
        if "median" not in row:
            continue
        rates.setdefault(row["unit"], {})[name] = row
        published = rows.get(published_name(name.split(",")[0]), {})
        if part == "step" and "median" in published:
            row["over_published"] = row["median"] / published["median"]
    drawn = {
        unit: [
            replace(bar, ours=not any(peer in bar.name for peer in _PEERS)) for bar in bars(found, ours=True)
        ]
        for unit, found in rates.items()
    }
    facts = {name: found for name, row in rows.items() if (found := facts_in_words(row))}
    headings = [heading for heading, _ in FACTS.values() if any(heading in found for found in facts.values())]
    return {"rates": drawn, "facts": facts, "headings": headings}


def _step_view(step: Figures) -> Figures:
    methods = step["step"]["methods"].items()
    return {
        key: bars({name: row[key] for name, row in methods}, times, ours=True)
        for key in ("time_vs_naive", "peak_memory_vs_naive")
    }


def _race_view(race: Figures) -> Figures:
    rows, ranges = [], {}
    for name, prefix in RACERS.items():
        row = race["race"]["runners"][name]
        rates = [run["samples_per_s"] for run in row["runs"]]
        ranges[name] = {"median": row["samples_per_s"], "low": min(rates), "high": max(rates)}
        words = f"{percent(row['knn_before'], digits=1)} → {percent(row['knn_after'], digits=1)}"
        std = (row["spread"] or {"knn_after": 0.0})["knn_after"]
        runs = [run["knn_after"] for run in row["runs"]]
        colour = "peer" if prefix is None else "mixmask"
        rows.append(Points(name, words, colour, runs, row["knn_after"], std, row["knn_before"]))
    knn = svg(points(rows), "kNN top-1 of each runner, before and after")
    return {"speed": bars(ranges), "knn": knn, "prefixes": RACERS, "seeds": len(rates)}


def _evidence_view(evidence: Figures) -> Figures:
    strips = {
        probe: [
            Points(name, top1(row, probe), name, [run[probe] for run in row["runs"]], **row[probe])
            for name, row in evidence["evidence"].items()
        ]
        for probe in ("knn_top1", "linear_top1")
    }
    every = [row for rows in strips.values() for row in rows]
    figures = {measure: curves_of(evidence, measure) for measure in CURVES}
    return {
        "strips": {probe: svg(points(rows, every), probe) for probe, rows in strips.items()},
        "curves": {name: svg(figure, f"{name} by epoch") for name, figure in figures.items() if figure},
    }


def curves_of(evidence: Figures, measure: str) -> Figure | None:
    """Draw a measure of all methods by epoch; None if no method was trained."""
    runs = {
        name: [{point["epoch"]: point[measure] for point in run["curve"]} for run in row["runs"]]
        for name, row in evidence["evidence"].items()
    }
    return charts.curves(runs, share=measure == "knn_top1")


def top1(row: Figures, probe: str) -> str:
    """A method's top-1 over its runs: 81.62 ± 0.13 %, or 81.62 % for one run."""
    return percent(row[probe]["mean"], row[probe]["std"] if len(row["runs"]) > 1 else None)


def samples_per_s(row: Figures) -> str:
    """The median over a method's runs; a dash for an encoder that was not trained."""
    rates = [run["samples_per_s"] for run in row["runs"] if run.get("samples_per_s") is not None]
    return number(statistics.median(rates)) if rates else "–"


def machine(environment: Mapping[str, Any]) -> str:
    """The GPU, or the processor if there is none."""
    return environment["gpu"] or f"{environment['processor']}, {environment['cores']} cores, no GPU"


_VIEWS = {
    **{"loader": _loader_view, "half_hour": half_hour_view, "scale": _scale_view},
    **{"step": _step_view, "race": _race_view, "evidence": _evidence_view},
}
