"""Ratios of medians within one run: our figures over those of the peers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

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
"""The set of the ratios of crops and recipes."""
RAW_OURS, RAW_JPEG, RAW_FFCV = "ours, yuv420", "ours, jpeg", "ffcv, raw RGB"
CONVERT_OURS, CONVERT_FFCV = "ours", "ffcv DatasetWriter"
FUSED, COMPILED, EAGER = "ours, fused numba kernel", "torch.compile", "torch, eager"

GROUPS = ("crops", "recipe", "dali_backend", "raw_tier", "scaling", "convert", "photometric")
"""Keys of the ratios in the JSON, in the order in which they are shown."""
_CROPS, _RECIPE = (MAIN_SET, "crops"), (MAIN_SET, "recipe")
_DALI = (DALI_ONCE, DALI_TWICE)


class _Ratio(NamedTuple):
    group: str
    name: str
    words: str
    """What ours is compared with."""
    table: tuple[str, ...]
    """Keys of the table in the JSON."""
    ours: str
    others: tuple[str, ...]
    """Rows of the table; the highest figure counts."""
    figure: str = "median"


_RATIOS = (
    *(
        _Ratio(table[1], name, words, table, OURS, peers)
        for table in (_CROPS, _RECIPE)
        for name, words, peers in (
            ("vs_ffcv_decode_per_view", "FFCV, one decode per view", (FFCV,)),
            ("vs_dali_cpu", "DALI on the CPU, the faster of two ways", _DALI),
            ("vs_torchvision_pil", "torchvision + PIL", (TORCHVISION_PIL,)),
            ("vs_torchvision_v2", "torchvision v2", (TORCHVISION_V2,)),
            ("vs_spdl", "SPDL, the faster of two ways", (SPDL_FFMPEG, SPDL_TORCHVISION)),
            ("fraction_of_decode_limit", "libjpeg-turbo decoding alone, the limit", (DECODE_LIMIT,)),
        )
    ),
    *(
        _Ratio("dali_backend", *rest)
        for rest in (
            ("crops_vs_dali_cpu", "two crops: ours with DALI over stock DALI, the faster of two ways", _CROPS,
             OURS_DALI, _DALI),
            ("recipe_vs_dali_cpu", "whole recipe: ours with DALI over stock DALI", _RECIPE, OURS_DALI, _DALI),
            ("own_reader_over_own_order", "two crops with DALI: its own reader over our order", _CROPS,
             OURS_STREAM, (OURS_DALI,)),
            ("shards_over_beton", "two crops: shards over one .beton file", _CROPS, OURS_ON_SHARDS, (OURS,)),
        )
    ),
    _Ratio("raw_tier", "vs_ffcv_raw", "FFCV's raw RGB", ("raw",), RAW_OURS, (RAW_FFCV,)),
    _Ratio("raw_tier", "vs_jpeg_tier", "our JPEG tier", ("raw",), RAW_OURS, (RAW_JPEG,)),
    _Ratio("raw_tier", "bytes_vs_ffcv_raw", "FFCV's raw RGB, bytes on disk: less is better", ("raw",),
           RAW_OURS, (RAW_FFCV,), "bytes"),
    _Ratio("convert", "vs_ffcv_writer", "FFCV's DatasetWriter", ("convert",), CONVERT_OURS, (CONVERT_FFCV,)),
    _Ratio("photometric", "vs_compiled_torch", "torch.compile", ("photometric",), FUSED, (COMPILED,)),
)  # fmt: skip
WORDS = {ratio.name: ratio.words for ratio in _RATIOS}
"""Names of ratios → what ours is compared with."""


def ratios(tables: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the ratios by group, of all tables that exist.

    Args:
        tables: As in the JSON; each row has a ``median``, those of the raw table ``bytes`` too.
    """
    most = str(max(map(int, tables.get("scaling", {})), default=1))
    scaling = _Ratio("scaling", f"threads_{most}_over_1", "", ("scaling",), most, ("1",))
    found: dict[str, dict[str, float]] = {}
    for ratio in (*_RATIOS, scaling) if most != "1" else _RATIOS:
        rows: Mapping[str, Any] = tables
        for key in ratio.table:
            rows = rows.get(key, {})
        others = [rows[other][ratio.figure] for other in ratio.others if other in rows]
        if ratio.ours in rows and others:
            value = round(float(rows[ratio.ours][ratio.figure] / max(others)), 4)
            found.setdefault(ratio.group, {})[ratio.name] = value
    return found
