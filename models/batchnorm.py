"""BatchNorm over parts of a batch, and shuffles of the key batch.

In BatchNorm the output for an image depends on the other images through the batch statistics. If a query and
its key are normalised with statistics of the same images, the network can match them by these statistics
instead of by their contents. So the rows of the key batch are redistributed before the key encoder, over
ranks or over the parts of a `SplitBatchNorm2d`, and put back in order after it. Then query and key are
normalised with statistics of different images.

Shape letters: N batch on this rank, C channels, S side, G parts, R ranks, B branches, D embedding.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _check_divisible(batch_size: int, num_splits: int) -> None:
    if batch_size % num_splits:
        raise ValueError(
            f"a batch of {batch_size} cannot be split into {num_splits} equal parts for BatchNorm; "
            f"choose a batch size that is a multiple of {num_splits}, or fewer splits"
        )


@functools.cache
def missing_for_kernels() -> str:
    """What is missing to compile GPU kernels at run time, and how to install it; "" if nothing is missing.

    For each kernel, torch.compile's and ours, Triton compiles a launcher in C.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"there is no C compiler ({' or '.join(compilers)}): apt-get install gcc"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers are not installed: apt-get install python3-dev"
    return ""


class NormArguments(NamedTuple):
    """The arguments of `split_batch_norm` other than its input."""

    weight_C: Tensor
    """(C,) float32, like the next three."""
    bias_C: Tensor
    """Added after the multiplication by the weight."""
    running_mean_C: Tensor
    """Changed in place."""
    running_var_C: Tensor
    """Changed in place."""
    num_splits: int
    """G."""
    momentum: float
    """Weight of the new statistics in the running ones."""
    eps: float
    """Added to variances."""


# Forward and backward are one custom operation each. They write all parts into one output, so the parts need
# not be concatenated. The backward pass needs only the input and the statistics of the parts.


@torch.library.custom_op("maskmix::split_batch_norm", mutates_args=("running_mean_C", "running_var_C"))
def split_batch_norm(
    input: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each of G consecutive parts of a batch by its own statistics.

    The running statistics are updated in place, with the mean of the parts' means and unbiased variances.
    ``input`` is (N, C, S, S) in channels_last, and G divides N. The other arguments are those of
    `NormArguments`, which a custom operation must list one by one.

    Returns:
        The normalised batch, and (G, C) means and (G, C) 1 / standard deviations of the parts.
    """
    if input.device.type == "cuda":
        from models import batchnorm_triton

        norm = NormArguments(weight_C, bias_C, running_mean_C, running_var_C, num_splits, momentum, eps)
        return batchnorm_triton.forward(input, norm)
    output = torch.empty_like(input)
    # Each part updates a copy of the running statistics, and the copies are averaged.
    means_GC, vars_GC = running_mean_C.repeat(num_splits, 1), running_var_C.repeat(num_splits, 1)
    mean_GC, inverse_std_GC = torch.empty_like(means_GC), torch.empty_like(means_GC)
    for g, (part, out) in enumerate(zip(input.chunk(num_splits), output.chunk(num_splits), strict=True)):
        torch.ops.aten.native_batch_norm.out(
            *(part, weight_C, bias_C, means_GC[g], vars_GC[g], True, momentum, eps),
            out=out,
            save_mean=mean_GC[g],
            save_invstd=inverse_std_GC[g],
        )
    running_mean_C.copy_(means_GC.mean(0))
    running_var_C.copy_(vars_GC.mean(0))
    return output, mean_GC, inverse_std_GC


@split_batch_norm.register_fake
def _shapes(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    norm = NormArguments(*rest)
    mean_GC = norm.running_mean_C.new_empty(norm.num_splits, len(norm.running_mean_C))
    return torch.empty_like(input), mean_GC, torch.empty_like(mean_GC)


@torch.library.custom_op("maskmix::split_batch_norm_backward", mutates_args=())
def split_batch_norm_backward(
    grad: Tensor, input: Tensor, weight_C: Tensor, mean_GC: Tensor, inverse_std_GC: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `split_batch_norm` with respect to input, weight and bias.

    Args:
        grad: (N, C, S, S) in channels_last, gradient of the output.
        input: (N, C, S, S) in channels_last.
        weight_C: as `split_batch_norm` takes it.
        mean_GC: as `split_batch_norm` returns it.
        inverse_std_GC: likewise.
        eps: as `split_batch_norm` takes it.

    Returns:
        (N, C, S, S), and (C,) for weight and bias, summed over the parts.
    """
    if input.device.type == "cuda":
        from models import batchnorm_triton

        return batchnorm_triton.backward(grad, input, weight_C, mean_GC, inverse_std_GC)
    num_splits = len(mean_GC)
    input_grad = torch.empty_like(input)
    weight_grad_GC, bias_grad_GC = torch.empty_like(mean_GC), torch.empty_like(mean_GC)
    chunks = (x.chunk(num_splits) for x in (grad, input, input_grad))
    for g, (grad_part, part, out) in enumerate(zip(*chunks, strict=True)):
        torch.ops.aten.native_batch_norm_backward.out(
            *(grad_part, part, weight_C, None, None, mean_GC[g], inverse_std_GC[g], True, eps),
            [True, True, True],
            out0=out,
            out1=weight_grad_GC[g],
            out2=bias_grad_GC[g],
        )
    return input_grad, weight_grad_GC.sum(0), bias_grad_GC.sum(0)


@split_batch_norm_backward.register_fake
def _shapes_of_gradients(
    _: Tensor, input: Tensor, weight_C: Tensor, *__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(weight_C), torch.empty_like(weight_C)


class _SplitBatchNorm(torch.autograd.Function):
    """`split_batch_norm` with its gradient; returns only the normalised batch."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_C: Tensor, bias_C: Tensor, *rest: Any) -> Tensor:
        """Normalise; the arguments are those of `split_batch_norm`."""
        output: Tensor
        output, mean_GC, inverse_std_GC = split_batch_norm(input, weight_C, bias_C, *rest)
        ctx.save_for_backward(input, weight_C, mean_GC, inverse_std_GC)
        ctx.eps = rest[-1]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for input, weight and bias, and None for the five other arguments."""
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        gradients = split_batch_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
        return (*gradients, None, None, None, None, None)


def split_batch_norm_for_compiler(input: Tensor, norm: NormArguments) -> Tensor:
    """`split_batch_norm` in plain torch code, which torch.compile fuses with the layers around it."""
    x_GNCSS = input.unflatten(0, (norm.num_splits, -1)).to(norm.weight_C.dtype)
    var_GC, mean_GC = torch.var_mean(x_GNCSS, dim=(1, 3, 4), correction=0)
    with torch.no_grad():
        num = x_GNCSS[0, :, 0].numel()
        norm.running_mean_C.lerp_(mean_GC.mean(0), norm.momentum)
        norm.running_var_C.lerp_(var_GC.mean(0) * (num / (num - 1)), norm.momentum)
    scale_GC = norm.weight_C * torch.rsqrt(var_GC + norm.eps)
    mean, scale = (x_GC[:, None, :, None, None] for x_GC in (mean_GC, scale_GC))
    y_GNCSS: Tensor = (x_GNCSS - mean) * scale + norm.bias_C[:, None, None]
    return y_GNCSS.flatten(0, 1).to(input.dtype)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises each of ``num_splits`` consecutive parts of a training batch by itself.

    So one device computes the same as ``num_splits`` devices without synchronised BatchNorm. The running
    statistics are updated with the mean of the parts' statistics. In eval mode, and in the state dict, this
    is a plain BatchNorm2d.

    Args:
        num_features: C.
        num_splits: G, at least 1; 1 is plain BatchNorm. It must divide every training batch.
        eps: added to variances.
        momentum: weight of the new statistics in the running ones.

    Raises:
        ValueError: if ``num_splits`` is below 1; in ``forward``, if it does not divide the batch.
    """

    def __init__(self, num_features: int, num_splits: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if num_splits < 1:
            raise ValueError(f"num_splits is {num_splits}; it must be at least 1 (1 is plain BatchNorm)")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.num_splits = num_splits

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, S, S)."""
        if not self.training or self.num_splits == 1:
            return super().forward(input)
        _check_divisible(len(input), self.num_splits)
        mean_C, var_C = self._running(self.running_mean), self._running(self.running_var)
        self._running(self.num_batches_tracked).add_(1)
        norm = NormArguments(
            self.weight, self.bias, mean_C, var_C, self.num_splits, self.momentum or 0.0, self.eps
        )
        if torch.compiler.is_compiling() or (input.is_cuda and missing_for_kernels()):
            return split_batch_norm_for_compiler(input, norm)
        output: Tensor = _SplitBatchNorm.apply(input.contiguous(memory_format=torch.channels_last), *norm)
        return output

    @staticmethod
    def _running(buffer: Tensor | None) -> Tensor:
        assert buffer is not None  # this class always tracks running statistics
        return buffer

    def extra_repr(self) -> str:
        """Add the number of splits to what BatchNorm2d shows."""
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def _channels_first_to_last(x: Tensor) -> Tensor:
    """Make images (N, S, S, C), without a copy if they are channels_last; leaves embeddings as they are."""
    return x.movedim(1, -1).contiguous() if x.dim() == 4 else x.contiguous()


def _channels_last_to_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1) if x.dim() == 4 else x


def shuffle_across_splits(x: Tensor, num_splits: int) -> Tensor:
    """Reorder rows: each of ``num_splits`` consecutive parts gets rows of all old parts, evenly.

    Args:
        x: (N, …).
        num_splits: number of parts.

    Returns:
        (N, …); image batches are channels_last.

    Raises:
        ValueError: if ``num_splits`` does not divide N.
    """
    _check_divisible(len(x), num_splits)
    rows = _channels_first_to_last(x)
    shuffled = rows.unflatten(0, (num_splits, -1)).transpose(0, 1).flatten(0, 1)
    return _channels_last_to_first(shuffled)


def unshuffle_across_splits(x: Tensor, num_splits: int) -> Tensor:
    """Undo `shuffle_across_splits`."""
    rows = _channels_first_to_last(x)
    gathered = rows.unflatten(0, (-1, num_splits)).transpose(0, 1).flatten(0, 1)
    return _channels_last_to_first(gathered)


def join_branches(branches: Sequence[Tensor], num_splits: int) -> Tensor:
    """Concatenate B batches so that each of ``num_splits`` consecutive parts has rows of every batch.

    Args:
        branches: B tensors (N, …).
        num_splits: number of parts.

    Returns:
        (B·N, …); image batches are channels_last.

    Raises:
        ValueError: if ``num_splits`` does not divide N.
    """
    _check_divisible(len(branches[0]), num_splits)
    parts_BG = [_channels_first_to_last(x).chunk(num_splits) for x in branches]
    in_order = [part for parts_B in zip(*parts_BG, strict=True) for part in parts_B]
    return _channels_last_to_first(torch.cat(in_order))


def separate_branches(x: Tensor, num_branches: int, num_splits: int) -> list[Tensor]:
    """Undo `join_branches` for the encoder's output: (B·N, D) becomes B tensors (N, D)."""
    x_GBnD = x.unflatten(0, (num_splits, num_branches, -1))
    return [x_GBnD[:, branch].flatten(0, 1) for branch in range(num_branches)]


def _send_sizes(num_rows: int, rank: int, world_size: int) -> list[int]:
    """Number of rows that ``rank`` sends to each rank. Each rank also receives ``num_rows`` in total."""
    share, rest = divmod(num_rows, world_size)
    return [share + ((to - rank) % world_size < rest) for to in range(world_size)]


def _exchange(x: Tensor, send: list[int], receive: list[int]) -> Tensor:
    rows = _channels_first_to_last(x)
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, output_split_sizes=receive, input_split_sizes=send)
    return _channels_last_to_first(received)


def shuffle_across_ranks(x: Tensor) -> Tensor:
    """Distribute the rows of every rank evenly over all ranks.

    By all-to-all, each rank receives about N·(R − 1)/R rows of other ranks. Gathering all batches, as MoCo
    does, would receive N·(R − 1). The distribution is not random: the order of an epoch is random already,
    and there is no generator state to synchronise or to resume. Gradients are not computed. The process group
    must be initialised.

    Args:
        x: (N, …), with the same N on all ranks.

    Returns:
        (N, …); image batches are channels_last.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    send = _send_sizes(len(x), rank, world_size)
    receive = [_send_sizes(len(x), source, world_size)[rank] for source in range(world_size)]
    return _exchange(x, send, receive)


def unshuffle_across_ranks(x: Tensor) -> Tensor:
    """Undo `shuffle_across_ranks`: send every row back to its rank and its place."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    receive = _send_sizes(len(x), rank, world_size)
    send = [_send_sizes(len(x), source, world_size)[rank] for source in range(world_size)]
    return _exchange(x, send, receive)
