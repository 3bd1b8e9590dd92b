"""The counts of a step: graphs small enough to count by hand, and limits for the real ones."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.fusion import fuse
from benchmarks.ops import (
    CAN_COUNT_COMPILED,
    Counted,
    OpsBenchmark,
    count_photometric,
    count_step,
    main,
    total,
)

TINY = {"arch": "resnet10w16", "crop_px": 32, "batch_size": 8, "queue_len": 64, "bn_splits": 4}


def test_operations_and_bytes_by_hand() -> None:
    x = torch.ones(4, 8)
    with Counted() as counted:
        y = x.t() + 1
        with counted.part("sum"):
            y.sum().expand(3) * torch.ones(3)
    parts = counted.parts
    # The transposed view is free; the sum costs x and a number; an expanded number is read once.
    assert parts["loss"] == {"ops": 1, "bytes": 2 * 32 * 4}
    assert parts["sum"] == {"ops": 3, "bytes": (32 + 1) * 4 + 3 * 4 + (1 + 3 + 3) * 4}


def _fused(function: object, *inputs: Tensor) -> tuple[int, int]:
    kernels = fuse(make_fx(function)(*inputs).graph)
    return len(kernels), sum(kernel.num_bytes for kernel in kernels)


def test_fusion_by_hand() -> None:
    x, w = torch.ones(16, 16), torch.ones(16, 16)
    size = 16 * 16 * 4
    # A chain of pointwise operations reads and writes once; views are free.
    assert _fused(lambda x: (x * 2).relu().t() + 1, x) == (1, 2 * size)
    # Two results of the same input come from one kernel.
    assert _fused(lambda x: (x * 2, x + 3), x) == (1, 3 * size)
    # What needs the mean needs a second pass over the input; the first chain is computed again.
    assert _fused(lambda x: (x * 2) - (x * 2).mean(), x) == (2, (size + 4) + (size + 4 + size))
    # A product is a kernel of its own; its input and output lie in memory.
    assert _fused(lambda x, w: ((x + 1) @ w).relu(), x, w) == (3, 2 * size + 3 * size + 2 * size)


def test_split_batchnorm_is_as_many_operations_as_plain() -> None:
    config = OpsBenchmark(**TINY)
    split, plain = (count_step(config, "mixmask", parts) for parts in (4, 1))
    assert split["batchnorm"]["ops"] <= 1.3 * plain["batchnorm"]["ops"]
    assert total(split, "ops") <= 1.3 * total(plain, "ops")
    assert split["mixing"]["ops"] <= 20


def test_the_compiled_photometric_stage_moves_little() -> None:
    """A plain stage, operation by operation, moved 86 MB a view."""
    stage = count_photometric(OpsBenchmark())
    assert 3 * 224 * 224 * 3 < stage["bytes_per_view"] < 86e6 / 4


def test_the_program_counts_every_way(tmp_path: Path) -> None:
    if not CAN_COUNT_COMPILED:
        with pytest.raises(ValueError, match=r"which torch 2\.11 can; take a newer one"):
            main(OpsBenchmark(**TINY))
        return
    file = tmp_path / "ops.json"
    main(OpsBenchmark(json=file, methods=("moco",), **TINY))
    result = json.loads(file.read_text())
    assert list(result["methods"]) == ["moco", "mixmask"]
    for ways in result["methods"].values():
        assert ways["eager"]["total_ops"] > ways["compiled"]["total_ops"] > 0
        assert min(way["total_bytes"] for way in ways.values()) > 0
    assert result["total_ops"] == result["methods"]["mixmask"]["eager"]["total_ops"]
    assert result["batchnorm"]["ops_vs_plain"] <= 1.3
    with pytest.raises(ValueError, match="batch of 8 in 3 splits"):
        OpsBenchmark(**TINY | {"bn_splits": 3})
