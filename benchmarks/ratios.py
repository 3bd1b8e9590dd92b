"""Ratios of medians within one run: our figures over those of the peers."""

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

from benchmarks.peers import contract as peers

MAIN_SET = "reencoded"
"""The set of the ratios of crops and recipes."""
RAW_OURS, RAW_JPEG, RAW_FFCV = "ours, yuv420", "ours, jpeg", "ffcv, raw RGB"
CONVERT_OURS, CONVERT_FFCV = "ours", "ffcv DatasetWriter"
FUSED, COMPILED, EAGER = "ours, fused numba kernel", "torch.compile", "torch, eager"

_CROPS, _RECIPE = (MAIN_SET, "crops"), (MAIN_SET, "recipe")
_DALI = (peers.DALI_ONCE, peers.DALI_TWICE)


class _Ratio(NamedTuple):
    words: str
    """What ours is compared with."""
    table: tuple[str, ...]
    """Keys of the table in the JSON."""
    ours: str
    others: tuple[str, ...]
    """Rows of the table; the highest figure counts."""
    figure: str = "median"


def _over_peers(table: tuple[str, ...]) -> dict[str, _Ratio]:
    rows = {
        "vs_ffcv_decode_per_view": ("FFCV, one decode per view", (peers.FFCV,)),
        "vs_dali_cpu": ("DALI on the CPU, the faster of two ways", _DALI),
        "vs_torchvision_pil": ("torchvision + PIL", (peers.TORCHVISION_PIL,)),
        "vs_torchvision_v2": ("torchvision v2", (peers.TORCHVISION_V2,)),
        "vs_spdl": ("SPDL, the faster of two ways", (peers.SPDL_FFMPEG, peers.SPDL_TORCHVISION)),
        "fraction_of_decode_limit": ("libjpeg-turbo decoding alone, the limit", (peers.DECODE_LIMIT,)),
    }
    return {name: _Ratio(words, table, peers.OURS, others) for name, (words, others) in rows.items()}


_RATIOS = {
    "crops": _over_peers(_CROPS),
    "recipe": _over_peers(_RECIPE),
    "dali_backend": {
        "crops_vs_dali_cpu": _Ratio("two crops: ours with DALI over stock DALI, the faster of two ways",
                                    _CROPS, peers.OURS_DALI, _DALI),
        "recipe_vs_dali_cpu": _Ratio("whole recipe: ours with DALI over stock DALI",
                                     _RECIPE, peers.OURS_DALI, _DALI),
        "own_reader_over_own_order": _Ratio("two crops with DALI: its own reader over our order",
                                            _CROPS, peers.OURS_STREAM, (peers.OURS_DALI,)),
        "shards_over_beton": _Ratio("two crops: shards over one .beton file",
                                    _CROPS, peers.OURS_ON_SHARDS, (peers.OURS,)),
    },
    "raw_tier": {
        "vs_ffcv_raw": _Ratio("FFCV's raw RGB", ("raw",), RAW_OURS, (RAW_FFCV,)),
        "vs_jpeg_tier": _Ratio("our JPEG tier", ("raw",), RAW_OURS, (RAW_JPEG,)),
        "bytes_vs_ffcv_raw": _Ratio("FFCV's raw RGB, bytes on disk: less is better",
                                    ("raw",), RAW_OURS, (RAW_FFCV,), "bytes"),
    },
    "scaling": {},
    "convert": {
        "vs_ffcv_writer": _Ratio("FFCV's DatasetWriter", ("convert",), CONVERT_OURS, (CONVERT_FFCV,)),
    },
    "photometric": {"vs_compiled_torch": _Ratio("torch.compile", ("photometric",), FUSED, (COMPILED,))},
}  # fmt: skip
GROUPS = tuple(_RATIOS)
"""Keys of the ratios in the JSON, in the order in which they are shown."""
WORDS = {name: ratio.words for group in _RATIOS.values() for name, ratio in group.items()}
"""Names of ratios → what ours is compared with."""


def ratios(tables: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the ratios by group, of all tables that exist.

    Args:
        tables: As in the JSON; each row has a ``median``, those of the raw table ``bytes`` too.
    """
    most = max(tables.get("scaling", {}), key=int, default="1")
    scaling = {f"threads_{most}_over_1": _Ratio("", ("scaling",), most, ("1",))} if most != "1" else {}
    found: dict[str, dict[str, float]] = {}
    for group, named in {**_RATIOS, "scaling": scaling}.items():
        for name, ratio in named.items():
            rows = reduce(lambda table, key: table.get(key, {}), ratio.table, tables)
            others = [rows[other][ratio.figure] for other in ratio.others if other in rows]
            if ratio.ours in rows and others:
                value = round(float(rows[ratio.ours][ratio.figure] / max(others)), 4)
                found.setdefault(group, {})[name] = value
    return found
