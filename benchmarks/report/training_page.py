"""Training's part of the page, and the curves of its evidence: figures arranged to be drawn."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.epoch import PLAIN
from benchmarks.report.charts import Part, chart, number, ratio_chart, seconds, times
from benchmarks.report.curves import COLOURS, Plot, Strip, axis, plot, row
from benchmarks.report.results import Rate
from benchmarks.report.training import (
    EPOCH_PARTS,
    EpochFigures,
    EvidenceFigures,
    MethodEvidence,
    RaceFigures,
    Racer,
    StepFigures,
    TrainingFigures,
)

PROBE_TITLES = {"knn_top1": "kNN top-1", "linear_top1": "linear top-1"}
_STRIP_TITLES = {"knn_top1": "Top-1 by kNN", "linear_top1": "Top-1 of the linear probe"}
_PANEL_TITLES = {
    "loss": "Loss",
    "loss_clean": "Loss of clean pairs",
    "rankme": "Effective rank of the features",
}
_SHARES = (0.0, 100.0)


def training_view(training: TrainingFigures) -> dict[str, Any]:
    """What training.html draws; a part is None or empty where its file is not there."""
    step, race, evidence = training.step, training.race, training.evidence
    view = {
        "step": _step_view(step) if step else None,
        "epochs": [_epoch_view(setting) for setting in step.epochs] if step else [],
        "race": _race_view(race) if race else None,
        "evidence": _evidence_view(evidence) if evidence else None,
    }
    words = {"step": "Step", "epochs": "Epoch", "race": "Race", "evidence": "Evidence"}
    links = [(part.removesuffix("s"), words[part]) for part, shown in view.items() if shown]
    return {**view, "links": links, "colours": COLOURS if evidence else {}}


def knn_plot(evidence: EvidenceFigures) -> Plot | None:
    """kNN top-1 by epoch of every method that was trained."""
    return plot("kNN top-1 during training", _curves(evidence, "knn_top1", 100.0), " %")


def percent(mean: float, std: float, num_runs: int) -> str:
    """A top-1 as words: 81.62 ± 0.13 %, without a spread where there is but one run."""
    return f"{100 * mean:.2f} ± {100 * std:.2f} %" if num_runs > 1 else f"{100 * mean:.2f} %"


def samples_per_s(found: MethodEvidence) -> str:
    """The median over runs as words."""
    return number(statistics.median(found.rates)) if found.rates else "–"


def _step_view(step: StepFigures) -> dict[str, Any]:
    return {
        "figures": step,
        "charts": [
            ("Time", ratio_chart({name: row.time_vs_naive for name, row in step.methods.items()})),
            (
                "Peak memory",
                ratio_chart({name: row.peak_memory_vs_naive for name, row in step.methods.items()}),
            ),
        ],
    }


def _epoch_view(setting: EpochFigures) -> dict[str, Any]:
    """Stacked bars on one scale, whose longest fills the width."""
    longest = max(sum(row.split.values()) for row in setting.rows.values()) or 1.0
    return {
        "figures": setting,
        "parts": EPOCH_PARTS,
        "rows": [
            {
                "name": name,
                "ours": name != PLAIN,
                "text": seconds(row.seconds.median),
                "spread": f"{number(row.seconds.low)} … {number(row.seconds.high)} s",
                "parts": stacked(row.split, longest),
            }
            for name, row in setting.rows.items()
        ],
    }


def stacked(split: Mapping[str, float], longest: float) -> list[Part]:
    """Seconds of each part one after the other, where ``longest`` seconds fill the width."""
    parts: list[Part] = []
    start = 0.0
    total = sum(split.values()) or 1.0
    for name, value in split.items():
        width = 100 * value / longest
        parts.append(Part(name, seconds(value), f"{100 * value / total:.0f} %", start, width))
        start += width
    return parts


def _race_view(race: RaceFigures) -> dict[str, Any]:
    racers = race.racers.values()
    num_seeds = len(next(iter(racers)).rates)
    along = axis(
        [100 * knn for racer in racers for knn in (*racer.knn_before, *racer.knn_after)], 5, " %", _SHARES
    )
    return {
        "figures": race,
        "several": num_seeds if num_seeds > 1 else 0,
        "speed": chart({racer.name: _speed(racer) for racer in racers}, "samples/s"),
        "knn": Strip(
            tuple(
                row(
                    racer.name,
                    f"{100 * racer.mean['knn_before']:.1f} → {100 * racer.mean['knn_after']:.1f} %",
                    [100 * knn for knn in racer.knn_after],
                    100 * racer.mean["knn_after"],
                    100 * racer.spread.get("knn_after", 0.0),
                    along,
                    "of-ours" if racer.is_ours else "of-peer",
                    start=100 * racer.mean["knn_before"],
                )
                for racer in racers
            ),
            along,
        ),
        "rows": [
            {"name": racer.name, "ours": racer.is_ours, "cells": _race_cells(race, racer)} for racer in racers
        ],
    }


def _speed(racer: Racer) -> Rate:
    return Rate(
        racer.name, racer.mean["samples_per_s"], min(racer.rates), max(racer.rates), tuple(racer.rates)
    )


def _race_cells(race: RaceFigures, racer: Racer) -> list[str]:
    """Samples/s and over lightly's, samples, kNN before, after and over lightly's, kNN of the whole bank."""
    mean, spread = racer.mean, racer.spread
    return [
        number(mean["samples_per_s"]) + (f" ± {number(spread['samples_per_s'])}" if spread else ""),
        times(race.speed[racer.name]) if racer.is_ours else "–",
        times(race.speed_at_best[racer.name]) if racer.is_ours else "–",
        f"{mean['samples']:,.0f}",
        f"{100 * mean['knn_before']:.1f} %",
        f"{100 * mean['knn_after']:.1f}" + (f" ± {100 * spread['knn_after']:.1f} %" if spread else " %"),
        *(
            f"{gain[racer.name]:+.1f} points" if racer.is_ours else "–"
            for gain in (race.gain, race.gain_at_best)
        ),
        f"{100 * mean['knn_whole_before']:.1f} → {100 * mean['knn_whole_after']:.1f} %",
    ]


def _evidence_view(evidence: EvidenceFigures) -> dict[str, Any]:
    return {
        "figures": evidence,
        "strips": [(title, _strip(evidence, probe)) for probe, title in _STRIP_TITLES.items()],
        "rows": [
            {
                "name": name,
                "cells": [
                    *(
                        percent(found.probes[probe].mean, found.probes[probe].std, found.num_runs)
                        for probe in PROBE_TITLES
                    ),
                    samples_per_s(found),
                    str(found.num_runs),
                ],
            }
            for name, found in evidence.methods.items()
        ],
        "main": knn_plot(evidence),
        "panels": [
            drawn
            for measure, title in _PANEL_TITLES.items()
            if (drawn := plot(title, _curves(evidence, measure)))
        ],
    }


def _strip(evidence: EvidenceFigures, probe: str) -> Strip:
    """One probe's rows, on the axis that both probes share."""
    ends = [
        100 * value
        for found in evidence.methods.values()
        for one in found.probes.values()
        for value in (*one.runs, one.mean - one.std, one.mean + one.std)
    ]
    along = axis(ends, 5, " %", _SHARES)
    rows = []
    for name, found in evidence.methods.items():
        one = found.probes[probe]
        words = percent(one.mean, one.std, found.num_runs)
        runs = [100 * value for value in one.runs]
        rows.append(row(name, words, runs, 100 * one.mean, 100 * one.std, along, f"method-{name}"))
    return Strip(tuple(rows), along)


def _curves(
    evidence: EvidenceFigures, measure: str, factor: float = 1.0
) -> dict[str, Sequence[Mapping[int, float]]]:
    return {
        name: [{epoch: factor * value for epoch, value in run.items()} for run in found.curves[measure]]
        for name, found in evidence.methods.items()
    }
