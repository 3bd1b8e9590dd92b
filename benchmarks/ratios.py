"""The figures that are asked for first: ratios of medians within one run."""

from collections.abc import Mapping
from typing import Any

from benchmarks.peers.contract import (
    DALI_ONCE,
    DALI_TWICE,
    DECODE_LIMIT,
    FFCV,
    OURS,
    OURS_DALI,
    OURS_ON_SHARDS,
    OURS_STREAM,
    SPDL_FFMPEG,
    SPDL_TORCHVISION,
    TORCHVISION_PIL,
    TORCHVISION_V2,
)

MAIN_SET = "reencoded"
"""The set whose tables the ratios are taken from."""
RAW_OURS, RAW_JPEG, RAW_FFCV = "ours, yuv420", "ours, jpeg", "ffcv, raw RGB"
CONVERT_OURS, CONVERT_FFCV = "ours", "ffcv DatasetWriter"
FUSED, COMPILED, EAGER = "ours, fused numba kernel", "torch.compile", "torch, eager"

GROUPS = ("crops", "recipe", "dali_backend", "raw_tier", "scaling", "convert", "photometric")
"""Where in the JSON ratios stand, in the order in which they are shown."""
WORDS = {
    "vs_ffcv_decode_per_view": "FFCV, one decode per view",
    "vs_dali_cpu": "DALI on the CPU, the faster of two ways",
    "vs_torchvision_pil": "torchvision + PIL",
    "vs_torchvision_v2": "torchvision v2",
    "vs_spdl": "SPDL, the faster of two ways",
    "fraction_of_decode_limit": "libjpeg-turbo decoding alone, the limit",
    "crops_vs_dali_cpu": "two crops: ours with DALI over stock DALI, the faster of two ways",
    "recipe_vs_dali_cpu": "whole recipe: ours with DALI over stock DALI",
    "own_reader_over_own_order": "two crops with DALI: its own reader over our order",
    "shards_over_beton": "two crops: shards over one .beton file",
    "vs_ffcv_raw": "FFCV's raw RGB",
    "vs_jpeg_tier": "our JPEG tier",
    "bytes_vs_ffcv_raw": "FFCV's raw RGB, bytes on disk: less is better",
    "vs_ffcv_writer": "FFCV's DatasetWriter",
    "vs_compiled_torch": "torch.compile",
}
"""Names of ratios → what ours is compared with, in words."""
_STOCK_DALI = (DALI_ONCE, DALI_TWICE)
# The ratio's name and the peers it is against; of several the fastest counts.
_AGAINST = {
    "vs_ffcv_decode_per_view": (FFCV,),
    "vs_dali_cpu": _STOCK_DALI,
    "vs_torchvision_pil": (TORCHVISION_PIL,),
    "vs_torchvision_v2": (TORCHVISION_V2,),
    "vs_spdl": (SPDL_FFMPEG, SPDL_TORCHVISION),
    "fraction_of_decode_limit": (DECODE_LIMIT,),
}
Rates = Mapping[str, Mapping[str, Any]]


def ratios(tables: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """All ratios whose tables are there.

    Args:
        tables: as in the JSON; each row has a ``median``, those of the raw table ``bytes`` too.
    """
    found: dict[str, dict[str, float]] = {}
    main = tables.get(MAIN_SET, {})
    for work in ("crops", "recipe"):
        rates: Rates = main.get(work, {})
        found[work] = {
            name: value
            for name, peers in _AGAINST.items()
            if (value := _over(rates, OURS, *peers)) is not None
        }
    crops, recipe = main.get("crops", {}), main.get("recipe", {})
    raw, scaling = tables.get("raw", {}), tables.get("scaling", {})
    most = max(map(int, scaling), default=1)
    for group, ratio, value in (
        ("dali_backend", "crops_vs_dali_cpu", _over(crops, OURS_DALI, *_STOCK_DALI)),
        ("dali_backend", "recipe_vs_dali_cpu", _over(recipe, OURS_DALI, *_STOCK_DALI)),
        ("dali_backend", "own_reader_over_own_order", _over(crops, OURS_STREAM, OURS_DALI)),
        ("dali_backend", "shards_over_beton", _over(crops, OURS_ON_SHARDS, OURS)),
        ("raw_tier", "vs_ffcv_raw", _over(raw, RAW_OURS, RAW_FFCV)),
        ("raw_tier", "vs_jpeg_tier", _over(raw, RAW_OURS, RAW_JPEG)),
        ("raw_tier", "bytes_vs_ffcv_raw", _over(raw, RAW_OURS, RAW_FFCV, key="bytes")),
        ("scaling", f"threads_{most}_over_1", _over(scaling, str(most), "1") if most > 1 else None),
        ("convert", "vs_ffcv_writer", _over(tables.get("convert", {}), CONVERT_OURS, CONVERT_FFCV)),
        ("photometric", "vs_compiled_torch", _over(tables.get("photometric", {}), FUSED, COMPILED)),
    ):
        if value is not None:
            found.setdefault(group, {})[ratio] = value
    return {
        group: {name: round(value, 4) for name, value in each.items()}
        for group, each in found.items()
        if each
    }


def _over(rates: Rates, ours: str, *others: str, key: str = "median") -> float | None:
    """Our figure over the highest of the others'; None where ours or all others are missing."""
    there = [rates[other][key] for other in others if other in rates]
    return float(rates[ours][key] / max(there)) if ours in rates and there else None
