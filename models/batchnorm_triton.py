"""The split BatchNorm of `models.batchnorm` for NVIDIA GPUs: three Triton kernels forward, three backward.

An image batch in channels_last is a matrix: rows are pixels, columns are channels. A part of the batch is M
consecutive rows. The forward pass has three steps, each a kernel:

1. For blocks of rows of every part, compute the mean and the sum of squared deviations. Each block first
   subtracts the mean of its first rows from its values. Otherwise large means would cause cancellation.
2. Combine the results of the blocks to the mean and 1 / standard deviation of every part, and update the
   running statistics.
3. Normalise the rows.

The backward pass has three steps of the same kind. In steps 1 and 3, each program of a kernel handles a block
of rows and 64 channels of one part, tile by tile. The speed of these kernels has not been measured on a GPU
yet.

Shape letters: N batch, C channels, S side, G parts, M rows of a part, B blocks of rows in a part. In the
kernels a name's suffix is the shape of the tile: r rows, c channels, g parts, b blocks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.batchnorm import NormArguments

_ROWS, _CHANNELS = 64, 64
"""Size of a tile."""
_FINISH_CHANNELS = 8
"""Channels that a program of step 2 reduces."""
_FINISH_ELEMENTS = 8192
"""Largest number of partial results that a program of step 2 reduces."""
_PROGRAMS, _PROGRAMS_OF_ROWS = 1024, 4096
"""Number of programs in step 1 and in step 3, about; a large GPU has 132 multiprocessors."""


@triton.jit
def _tile(part, first, stop, channel_c, C, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the tile from row ``first`` on, and the mask of those before row ``stop`` and channel C."""
    row_r = first + tl.arange(0, ROWS)
    inside_rc = (row_r < stop)[:, None] & (channel_c < C)[None, :]
    return part + row_r.to(tl.int64)[:, None] * C + channel_c[None, :], inside_rc


@triton.jit
def _partial_statistics(  # type: ignore[no-untyped-def]
    x, mean_GBC, square_GBC, M, C, B, block_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Step 1: mean, and sum of squared deviations from it, of one block of rows."""
    channel_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b, g = tl.program_id(1), tl.program_id(2)
    part = x + g.to(tl.int64) * M * C
    first, stop = b * block_rows, tl.minimum((b + 1) * block_rows, M)
    at_rc, inside_rc = _tile(part, first, stop, channel_c, C, ROWS)
    shift_c = tl.sum(tl.load(at_rc, mask=inside_rc, other=0.0).to(FLOAT), 0) / tl.minimum(stop - first, ROWS)
    sum_rc = tl.zeros((ROWS, CHANNELS), FLOAT)
    square_rc = tl.zeros((ROWS, CHANNELS), FLOAT)
    for start in range(first, stop, ROWS):
        at_rc, inside_rc = _tile(part, start, stop, channel_c, C, ROWS)
        x_rc = tl.load(at_rc, mask=inside_rc, other=0.0).to(FLOAT)
        off_rc = tl.where(inside_rc, x_rc - shift_c[None, :], 0.0)
        sum_rc += off_rc
        square_rc += off_rc * off_rc
    sum_c = tl.sum(sum_rc, 0)
    num = stop - first
    out_c = (g * B + b) * C + channel_c
    tl.store(mean_GBC + out_c, shift_c + sum_c / num, mask=channel_c < C)
    tl.store(square_GBC + out_c, tl.sum(square_rc, 0) - sum_c * sum_c / num, mask=channel_c < C)


@triton.jit
def _finish_statistics(  # type: ignore[no-untyped-def]
    mean_GBC, square_GBC, mean_GC, inverse_std_GC, running_mean_C, running_var_C,
    M, C, G, B, block_rows, momentum, eps,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Step 2: statistics of all parts; updates the running statistics with their mean."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    g, b = tl.arange(0, PARTS)[:, None, None], tl.arange(0, BLOCKS)[None, :, None]
    inside = (g < G) & (b < B) & (c < C)
    mean_gbc = tl.load(mean_GBC + (g * B + b) * C + c, mask=inside, other=0.0)
    square_gbc = tl.load(square_GBC + (g * B + b) * C + c, mask=inside, other=0.0)
    num_gbc = tl.where(inside, tl.minimum(block_rows, M - b * block_rows), 0)
    mean_gc = tl.sum(mean_gbc * num_gbc, 1) / M
    off_gbc = mean_gbc - tl.expand_dims(mean_gc, 1)
    square_gc = tl.sum(square_gbc + num_gbc * off_gbc * off_gbc, 1)
    g2, c2 = tl.arange(0, PARTS)[:, None], tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside2 = (g2 < G) & (c2 < C)
    tl.store(mean_GC + g2 * C + c2, mean_gc, mask=inside2)
    tl.store(inverse_std_GC + g2 * C + c2, 1 / tl.sqrt(square_gc / M + eps), mask=inside2)
    # The running variance is unbiased, as in BatchNorm2d.
    new_mean_c = tl.sum(tl.where(inside2, mean_gc, 0.0), 0) / G
    new_var_c = tl.sum(tl.where(inside2, square_gc, 0.0), 0) / (G * (M - 1.0))
    channel_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    old_mean_c = tl.load(running_mean_C + channel_c, mask=channel_c < C)
    old_var_c = tl.load(running_var_C + channel_c, mask=channel_c < C)
    tl.store(
        running_mean_C + channel_c, old_mean_c + momentum * (new_mean_c - old_mean_c), mask=channel_c < C
    )
    tl.store(running_var_C + channel_c, old_var_c + momentum * (new_var_c - old_var_c), mask=channel_c < C)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x, y, mean_GC, inverse_std_GC, weight_C, bias_C, M, C, block_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Step 3: y = (x − mean) / σ · weight + bias for one block of rows."""
    channel_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b, g = tl.program_id(1), tl.program_id(2)
    known_c = channel_c < C
    mean_c = tl.load(mean_GC + g * C + channel_c, mask=known_c)
    scale_c = tl.load(inverse_std_GC + g * C + channel_c, mask=known_c)
    scale_c *= tl.load(weight_C + channel_c, mask=known_c).to(FLOAT)
    bias_c = tl.load(bias_C + channel_c, mask=known_c).to(FLOAT)
    offset = g.to(tl.int64) * M * C
    first, stop = b * block_rows, tl.minimum((b + 1) * block_rows, M)
    for start in range(first, stop, ROWS):
        at_rc, inside_rc = _tile(x + offset, start, stop, channel_c, C, ROWS)
        to_rc, _ = _tile(y + offset, start, stop, channel_c, C, ROWS)
        x_rc = tl.load(at_rc, mask=inside_rc, other=0.0).to(FLOAT)
        tl.store(to_rc, (x_rc - mean_c[None, :]) * scale_c[None, :] + bias_c[None, :], mask=inside_rc)


@triton.jit
def _partial_gradients(  # type: ignore[no-untyped-def]
    dy, x, mean_GC, inverse_std_GC, sum_GBC, dot_GBC, M, C, B, block_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Step 1: Σ dy and Σ dy · x̂ of one block of rows, where x̂ is the normalised input."""
    channel_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b, g = tl.program_id(1), tl.program_id(2)
    mean_c = tl.load(mean_GC + g * C + channel_c, mask=channel_c < C)
    inverse_std_c = tl.load(inverse_std_GC + g * C + channel_c, mask=channel_c < C)
    offset = g.to(tl.int64) * M * C
    first, stop = b * block_rows, tl.minimum((b + 1) * block_rows, M)
    sum_rc = tl.zeros((ROWS, CHANNELS), FLOAT)
    dot_rc = tl.zeros((ROWS, CHANNELS), FLOAT)
    for start in range(first, stop, ROWS):
        at_rc, inside_rc = _tile(x + offset, start, stop, channel_c, C, ROWS)
        grad_rc, _ = _tile(dy + offset, start, stop, channel_c, C, ROWS)
        x_rc = tl.load(at_rc, mask=inside_rc, other=0.0).to(FLOAT)
        dy_rc = tl.load(grad_rc, mask=inside_rc, other=0.0).to(FLOAT)
        sum_rc += dy_rc
        dot_rc += dy_rc * (x_rc - mean_c[None, :])
    out_c = (g * B + b) * C + channel_c
    tl.store(sum_GBC + out_c, tl.sum(sum_rc, 0), mask=channel_c < C)
    tl.store(dot_GBC + out_c, tl.sum(dot_rc, 0) * inverse_std_c, mask=channel_c < C)


@triton.jit
def _finish_gradients(  # type: ignore[no-untyped-def]
    sum_GBC, dot_GBC, sum_GC, dot_GC, weight_grad_C, bias_grad_C, C, G, B,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Step 2: the sums of every part, and the gradients of weight and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    g, b = tl.arange(0, PARTS)[:, None, None], tl.arange(0, BLOCKS)[None, :, None]
    inside = (g < G) & (b < B) & (c < C)
    sum_gc = tl.sum(tl.load(sum_GBC + (g * B + b) * C + c, mask=inside, other=0.0), 1)
    dot_gc = tl.sum(tl.load(dot_GBC + (g * B + b) * C + c, mask=inside, other=0.0), 1)
    g2, c2 = tl.arange(0, PARTS)[:, None], tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tl.store(sum_GC + g2 * C + c2, sum_gc, mask=(g2 < G) & (c2 < C))
    tl.store(dot_GC + g2 * C + c2, dot_gc, mask=(g2 < G) & (c2 < C))
    channel_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(bias_grad_C + channel_c, tl.sum(sum_gc, 0), mask=channel_c < C)
    tl.store(weight_grad_C + channel_c, tl.sum(dot_gc, 0), mask=channel_c < C)


@triton.jit
def _input_gradient(  # type: ignore[no-untyped-def]
    dy, x, dx, mean_GC, inverse_std_GC, weight_C, sum_GC, dot_GC, M, C, block_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Step 3: dx = weight / σ · (dy − mean(dy) − x̂ · mean(dy · x̂)) for one block of rows."""
    channel_c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    b, g = tl.program_id(1), tl.program_id(2)
    known_c = channel_c < C
    mean_c = tl.load(mean_GC + g * C + channel_c, mask=known_c)
    inverse_std_c = tl.load(inverse_std_GC + g * C + channel_c, mask=known_c)
    scale_c = inverse_std_c * tl.load(weight_C + channel_c, mask=known_c).to(FLOAT)
    mean_dy_c = tl.load(sum_GC + g * C + channel_c, mask=known_c) / M
    slope_c = tl.load(dot_GC + g * C + channel_c, mask=known_c) / M * inverse_std_c
    offset = g.to(tl.int64) * M * C
    first, stop = b * block_rows, tl.minimum((b + 1) * block_rows, M)
    for start in range(first, stop, ROWS):
        at_rc, inside_rc = _tile(x + offset, start, stop, channel_c, C, ROWS)
        grad_rc, _ = _tile(dy + offset, start, stop, channel_c, C, ROWS)
        to_rc, _ = _tile(dx + offset, start, stop, channel_c, C, ROWS)
        x_rc = tl.load(at_rc, mask=inside_rc, other=0.0).to(FLOAT)
        dy_rc = tl.load(grad_rc, mask=inside_rc, other=0.0).to(FLOAT)
        dx_rc = scale_c[None, :] * (dy_rc - mean_dy_c[None, :] - (x_rc - mean_c[None, :]) * slope_c[None, :])
        tl.store(to_rc, dx_rc, mask=inside_rc)


class _Sizes:
    """Sizes of tiles, blocks and grids for one batch."""

    def __init__(self, x: Tensor, num_parts: int) -> None:
        self.parts, self.channels = num_parts, x.shape[1]
        self.rows = x.numel() // self.channels // num_parts
        columns = triton.cdiv(self.channels, _CHANNELS)
        parts = triton.next_power_of_2(num_parts)
        most = max(1, _FINISH_ELEMENTS // (_FINISH_CHANNELS * parts))
        blocks = min(most, triton.cdiv(_PROGRAMS, columns * num_parts), triton.cdiv(self.rows, _ROWS))
        self.block_rows, self.blocks = self._blocks(blocks)
        self.grid = (columns, self.blocks, num_parts)
        # Step 3 has no partial results that step 2 must reduce, so it may have more blocks.
        self.row_block_rows, row_blocks = self._blocks(triton.cdiv(_PROGRAMS_OF_ROWS, columns * num_parts))
        self.row_grid = (columns, row_blocks, num_parts)
        self.finish_grid = (triton.cdiv(self.channels, _FINISH_CHANNELS),)
        self.float = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.tile: dict[str, Any] = {
            "ROWS": _ROWS,
            "CHANNELS": _CHANNELS,
            "FLOAT": tl.float64 if self.float == torch.float64 else tl.float32,
        }
        self.finish: dict[str, Any] = {
            "PARTS": parts,
            "BLOCKS": triton.next_power_of_2(self.blocks),
            "CHANNELS": _FINISH_CHANNELS,
            "num_warps": 8,
        }

    def _blocks(self, num: int) -> tuple[int, int]:
        """Rows of a block, in whole tiles, and the number of blocks: about ``num``, none of them empty."""
        rows = triton.cdiv(triton.cdiv(self.rows, num), _ROWS) * _ROWS
        return rows, triton.cdiv(self.rows, rows)

    def empty(self, like: Tensor, *leading: int) -> Tensor:
        """(…, C), uninitialised, on the device of ``like``."""
        return torch.empty(*leading, self.channels, dtype=self.float, device=like.device)


def forward(x: Tensor, norm: NormArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `models.batchnorm.split_batch_norm` on a GPU; x is (N, C, S, S) in channels_last."""
    num_parts = norm.num_splits
    sizes = _Sizes(x, num_parts)
    y = torch.empty_like(x)
    mean_GC, inverse_std_GC = sizes.empty(x, num_parts), sizes.empty(x, num_parts)
    mean_GBC, square_GBC = (sizes.empty(x, num_parts, sizes.blocks) for _ in range(2))
    rows, channels, blocks, block_rows = sizes.rows, sizes.channels, sizes.blocks, sizes.block_rows
    _partial_statistics[sizes.grid](x, mean_GBC, square_GBC, rows, channels, blocks, block_rows, **sizes.tile)
    _finish_statistics[sizes.finish_grid](
        mean_GBC, square_GBC, mean_GC, inverse_std_GC, norm.running_mean_C, norm.running_var_C,
        rows, channels, num_parts, blocks, block_rows, norm.momentum, norm.eps, **sizes.finish,
    )  # fmt: skip
    _normalise[sizes.row_grid](
        x, y, mean_GC, inverse_std_GC, norm.weight_C, norm.bias_C,
        rows, channels, sizes.row_block_rows, **sizes.tile,
    )  # fmt: skip
    return y, mean_GC, inverse_std_GC


def backward(
    grad: Tensor, x: Tensor, weight_C: Tensor, mean_GC: Tensor, inverse_std_GC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `models.batchnorm.split_batch_norm_backward` on a GPU; grad and x are in channels_last."""
    num_parts = len(mean_GC)
    sizes = _Sizes(x, num_parts)
    dx = torch.empty_like(x)
    sum_GC, dot_GC = sizes.empty(x, num_parts), sizes.empty(x, num_parts)
    weight_grad_C, bias_grad_C = torch.empty_like(weight_C), torch.empty_like(weight_C)
    sum_GBC, dot_GBC = (sizes.empty(x, num_parts, sizes.blocks) for _ in range(2))
    rows, channels, blocks, block_rows = sizes.rows, sizes.channels, sizes.blocks, sizes.block_rows
    _partial_gradients[sizes.grid](
        grad, x, mean_GC, inverse_std_GC, sum_GBC, dot_GBC, rows, channels, blocks, block_rows, **sizes.tile
    )
    _finish_gradients[sizes.finish_grid](
        sum_GBC, dot_GBC, sum_GC, dot_GC, weight_grad_C, bias_grad_C,
        channels, num_parts, blocks, **sizes.finish,
    )  # fmt: skip
    _input_gradient[sizes.row_grid](
        grad, x, dx, mean_GC, inverse_std_GC, weight_C, sum_GC, dot_GC, rows, channels,
        sizes.row_block_rows, **sizes.tile,
    )  # fmt: skip
    return dx, weight_grad_C, bias_grad_C
