"""What the race has shown: figures over seeds, ours against lightly's, and the table of them."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.race_ours import Setting

OURS, MIXMASK = "ours, MoCo v2", "ours, MixMask"
LIGHTLY, LIGHTLY_AT_BEST = "lightly as documented", "lightly at its best"


def figures(runs: dict[str, list[dict[str, float]]], settings: dict[str, str]) -> dict[str, Any]:
    """The JSON's ``race``: means over seeds with their spread, and ours against lightly.

    Args:
        runs: of each runner, by seed; kNN as a share in [0, 1]. Ours are compared with lightly as it is
            documented, and with lightly at its best.
        settings: how each runner is set up.
    """
    means = {
        name: {key: statistics.fmean(run[key] for run in seeds) for key in seeds[0]}
        for name, seeds in runs.items()
    }
    ratios: dict[str, float] = {}
    for prefix, name in (("", OURS), ("mixmask_", MIXMASK)):
        for suffix, peer in (("lightly", LIGHTLY), ("lightly_at_best", LIGHTLY_AT_BEST)):
            mine, theirs = means[name], means[peer]
            ratios |= {
                f"{prefix}samples_per_s_vs_{suffix}": mine["samples_per_s"] / theirs["samples_per_s"],
                f"{prefix}knn_gain_over_{suffix}": 100 * (mine["knn_after"] - theirs["knn_after"]),
                f"{prefix}knn_gain_over_{suffix}_whole_bank": 100
                * (mine["knn_whole_after"] - theirs["knn_whole_after"]),
            }
    runners = {
        name: {**means[name], "spread": _spread(seeds), "runs": seeds, "configured": settings[name]}
        for name, seeds in runs.items()
    }
    return {**ratios, "runners": runners}


def _spread(seeds: list[dict[str, float]]) -> dict[str, float] | None:
    """Standard deviations over seeds; None for a single one."""
    if len(seeds) < 2:
        return None
    return {key: statistics.stdev(run[key] for run in seeds) for key in ("samples_per_s", "knn_after")}


def configured(setting: Setting, theirs: dict[str, tuple[Setting, tuple[int, int]]]) -> dict[str, str]:
    """How each runner is set up, in a sentence; ``theirs``: setting and hands of each of lightly's."""
    loop = (
        f"the compiled set by our loader, all cores, channels_last, BN over {setting.bn_splits} parts of the "
        "batch and keys dealt anew, freed memory kept between steps"
    )
    return {
        OURS: loop,
        MIXMASK: f"{loop}; one block mask per image on a grid of {setting.mixing.grid_size}",
        **{name: _configured_lightly(own == setting, *hands) for name, (own, hands) in theirs.items()},
    }


def _configured_lightly(our_views: bool, workers: int, torch_threads: int) -> str:
    views = "with the numbers of our views" if our_views else "as it comes"
    return (
        f"MoCoV2Transform {views}, MoCoProjectionHead, NTXentLoss with its memory bank, "
        "update_momentum, as in the documentation's example; PIL images made from pixels in memory, a "
        f"DataLoader with {workers} lasting worker(s), {torch_threads} thread(s) in torch, contiguous memory,"
        " BN over the whole batch (the example has no other)"
    )


def print_race(console: Console, result: dict[str, Any]) -> None:
    """A table of all runners, and ours against lightly's."""
    race, config = result["race"], result["config"]
    table = Table(title=f"Fashion-MNIST, {config['seconds']:g} s of training on {config['threads']} cores")
    for column in ("", "samples/s", "samples", "kNN before", "kNN after", "… whole bank"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in race["runners"].items():
        spread = row["spread"] or {}
        table.add_row(
            name,
            f"{row['samples_per_s']:,.0f}" + (f" ± {spread['samples_per_s']:,.0f}" if spread else ""),
            f"{row['samples']:,.0f}",
            f"{100 * row['knn_before']:.1f} %",
            f"{100 * row['knn_after']:.1f}" + (f" ± {100 * spread['knn_after']:.1f} %" if spread else " %"),
            f"{100 * row['knn_whole_before']:.1f} → {100 * row['knn_whole_after']:.1f} %",
        )
    console.print(table)
    for prefix, name in (("", OURS), ("mixmask_", MIXMASK)):
        for suffix, peer in (("lightly", "lightly's"), ("lightly_at_best", "lightly's at its best")):
            console.print(
                f"{name}: {race[f'{prefix}samples_per_s_vs_{suffix}']:.1f} × {peer} samples/s, "
                f"{race[f'{prefix}knn_gain_over_{suffix}']:+.1f} points of kNN"
            )
