"""The page: figures arranged in sections, drawn by page.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.report.charts import (
    Chart,
    chart,
    costs,
    mebibytes,
    megabytes,
    number,
    quantity,
    ratio_chart,
    stack,
    times,
)
from benchmarks.report.curves import COLOURS
from benchmarks.report.half_hour import HalfHourFigures, half_hour_view
from benchmarks.report.results import (
    DemoFigures,
    LoaderFigures,
    Rate,
    ScaleFigures,
)
from benchmarks.report.training import EvidenceFigures, RaceFigures, StepFigures, TrainingFigures
from benchmarks.report.training_page import knn_plot, training_view
from benchmarks.scale import MEASURES

_SET_TITLES = {"reencoded": "re-encoded photographs", "pass_through": "photographs as they are"}
_RATIO_TITLES = {
    "crops": "Two crops, samples/s over",
    "recipe": "Whole recipe, samples/s over",
    "dali_backend": "Shards, and DALI as our decoder, samples/s",
    "raw_tier": "Raw tier, over",
    "scaling": "Threads, samples/s",
    "convert": "Conversion, pictures/s over",
    "photometric": "Photometric stage, views/s over",
}
_RATIO_WORDS = {
    "vs_ffcv_decode_per_view": "FFCV, a decode per view",
    "vs_dali_cpu": "DALI on the CPU, the faster of two ways",
    "vs_torchvision_pil": "torchvision + PIL",
    "vs_torchvision_v2": "torchvision v2",
    "vs_spdl": "SPDL, the faster of two ways",
    "fraction_of_decode_limit": "libjpeg-turbo decode only, the limit",
    "vs_ffcv_raw": "FFCV's raw RGB",
    "vs_jpeg_tier": "our JPEG tier",
    "bytes_vs_ffcv_raw": "FFCV's raw RGB, in bytes on disk: less is better",
    "vs_ffcv_writer": "FFCV's DatasetWriter",
    "vs_compiled_torch": "torch.compile",
    "crops_vs_dali_cpu": "two crops: ours with DALI over stock DALI, the faster of two ways",
    "recipe_vs_dali_cpu": "whole recipe: ours with DALI over stock DALI",
    "own_reader_over_own_order": "two crops with DALI: its own reader over our order",
    "shards_over_beton": "two crops by our kernels: shards over one .beton file",
}


Measured = (
    LoaderFigures | HalfHourFigures | ScaleFigures | StepFigures | RaceFigures | EvidenceFigures | DemoFigures
)


def render(
    loader: LoaderFigures | None,
    scale: ScaleFigures | None,
    demo: DemoFigures | None,
    half_hour: HalfHourFigures | None = None,
    training: TrainingFigures | None = None,
) -> str:
    """The whole page as HTML that needs no network."""
    training = training or TrainingFigures()
    return (
        _templates()
        .get_template("page.html")
        .render(
            loader=_loader_view(loader) if loader else None,
            scale=_scale_view(scale) if scale else None,
            half_hour=half_hour_view(half_hour) if half_hour else None,
            demo=demo,
            training=training_view(training),
            environments=_environments(
                {
                    "Loaders": loader,
                    "Half an hour on a GPU": half_hour,
                    "Size of the set": scale,
                    "Steps and epochs": training.step,
                    "Race": training.race,
                    "Evidence": training.evidence,
                    "Demo": demo,
                }
            ),
        )
    )


def picture(evidence: EvidenceFigures) -> str | None:
    """The curves of kNN by epoch as an SVG file of its own; None where nothing was trained."""
    drawn = knn_plot(evidence)
    if drawn is None:
        return None
    template = _templates().get_template("evidence_picture.html")
    return template.render(plot=drawn, colours=COLOURS)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "megabytes": megabytes, "times": times, "mebibytes": mebibytes}
    environment.filters["at"] = "{:.2f}".format
    return environment


def _loader_view(loader: LoaderFigures) -> dict[str, Any]:
    threads = {name: int(name) for name in loader.scaling}
    one = loader.scaling.get("1")
    ideal = {name: one.median * num for name, num in threads.items()} if one else {}
    return {
        "figures": loader,
        "ratios": [
            (_RATIO_TITLES[group], _ratio_bars(ratios)) for group, ratios in loader.ratios.items() if ratios
        ],
        "crops": _by_set(loader, loader.crops, limit=True),
        "recipe": _by_set(loader, loader.recipe, limit=False),
        "raw": chart(loader.raw, "samples/s"),
        "scaling": chart(
            {name: _renamed(rate, _threads(name)) for name, rate in loader.scaling.items()},
            "samples/s",
            marks={_threads(name): value for name, value in ideal.items()},
            mark="so many times one thread",
            ours_alone=True,
        ),
        "convert": chart(loader.convert, "pictures/s"),
        "photometric": chart(loader.photometric, "views/s"),
        "stages": stack(loader.stages),
        "stages_total": quantity(sum(loader.stages.values()), "µs"),
    }


def _threads(name: str) -> str:
    return f"{name} thread{'' if name == '1' else 's'}"


def _renamed(rate: Rate, name: str) -> Rate:
    return Rate(name, rate.median, rate.low, rate.high, rate.turns)


def _by_set(
    loader: LoaderFigures, tables: Mapping[str, Mapping[str, Rate]], *, limit: bool
) -> list[dict[str, Any]]:
    return [
        {
            "title": _SET_TITLES[name],
            "facts": loader.sets[name],
            "chart": chart(rates, "samples/s", limit=limit),
            "rates": sorted(rates.values(), key=lambda rate: -rate.median),
        }
        for name, rates in tables.items()
        if rates
    ]


def _ratio_bars(ratios: Mapping[str, float | None]) -> dict[str, Any]:
    """Bars of what was measured, and the names of what was not."""
    words = {key: _RATIO_WORDS.get(key, key.replace("_", " ")) for key in ratios}
    return {
        "chart": ratio_chart({words[key]: value for key, value in ratios.items() if value is not None}),
        "missing": [words[key] for key, value in ratios.items() if value is None],
    }


def _scale_view(scale: ScaleFigures) -> dict[str, Any]:
    panels: list[tuple[str, Chart, float | None]] = []
    for measure, (title, unit) in MEASURES.items():
        rates = [_renamed(figures[measure], f"{count:,}") for count, figures in scale.counts.items()]
        panels.append((title, costs(rates, unit), scale.ratios.get(measure)))
    return {"figures": scale, "panels": panels, "index_ratio": scale.ratios.get("index_mib")}


def _environments(
    results: Mapping[str, Measured | None],
) -> list[tuple[str, Mapping[str, Any]]]:
    """What was measured on which machine; those of one machine and the same versions together."""
    together: list[tuple[list[str], Mapping[str, Any]]] = []
    for name, result in results.items():
        if result is None:
            continue
        names = next((names for names, where in together if where == result.environment), None)
        if names is None:
            together.append(([name], result.environment))
        else:
            names.append(name)
    return [(", ".join(names), where) for names, where in together]
