"""Keeping batch statistics from giving the positive pair away.

BatchNorm lets images of one batch see each other. If a query and its key are normalised in the same
company, the network can match them by that company and learn nothing. So the company of the keys is
changed: the batch is dealt out anew, over ranks or over the groups of a `SplitBatchNorm2d`.

Shape letters: N batch on this rank, C channels, S side, G groups, R ranks.
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
    """What this machine lacks to compile GPU kernels at run time, and what to do; "" for nothing.

    Triton compiles a launcher in C for each kernel, whether it is our own or torch.compile's.
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
    """(C,) float32, as the three after it."""
    bias_C: Tensor
    """Added after the multiplication by the weight."""
    running_mean_C: Tensor
    """Changed in place."""
    running_var_C: Tensor
    """Changed in place."""
    num_splits: int
    """G."""
    momentum: float
    """Share of the new statistics in the running ones."""
    eps: float
    """Added to variances."""


# One operation forward and one backward. Their kernels write each part where it belongs, so that nothing is
# copied to join parts, and the gradient needs nothing but the input and the parts' statistics.


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

    The running statistics move, in place, towards the mean of the parts' means and unbiased variances.

    Args:
        input: (N, C, S, S) in channels_last; G divides N.
        weight_C: (C,) float32, as the three after it.
        bias_C: added after the weight.
        running_mean_C: changed in place.
        running_var_C: changed in place.
        num_splits: G.
        momentum: share of the new statistics in the running ones.
        eps: added to variances.

    Returns:
        The normalised batch, and (G, C) means and 1 / standard deviations of the parts.
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
    running_mean_C, num_splits = rest[2], rest[4]
    mean_GC = running_mean_C.new_empty(num_splits, len(running_mean_C))
    return torch.empty_like(input), mean_GC, torch.empty_like(mean_GC)


@torch.library.custom_op("maskmix::split_batch_norm_backward", mutates_args=())
def split_batch_norm_backward(
    grad: Tensor, input: Tensor, weight_C: Tensor, mean_GC: Tensor, inverse_std_GC: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `split_batch_norm` by input, weight and bias, the last two summed over the parts.

    grad and input are (N, C, S, S) in channels_last, the rest as `split_batch_norm` takes and returns it.
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
    """The output of `split_batch_norm`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_C: Tensor, bias_C: Tensor, *rest: Any) -> Tensor:
        """Arguments as of `split_batch_norm`."""
        output: Tensor
        output, mean_GC, inverse_std_GC = split_batch_norm(input, weight_C, bias_C, *rest)
        ctx.save_for_backward(input, weight_C, mean_GC, inverse_std_GC)
        ctx.eps = rest[-1]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by input, weight and bias."""
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        gradients = split_batch_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
        return (*gradients, None, None, None, None, None)


def split_batch_norm_for_compiler(input: Tensor, norm: NormArguments) -> Tensor:
    """The output of `split_batch_norm` as plain arithmetic, which a compiler fuses with what is around it."""
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
    """BatchNorm2d whose training statistics are taken over ``num_splits`` consecutive parts of the batch.

    One device then behaves like ``num_splits`` devices without synchronised BN. The running statistics move
    towards the mean of the parts' statistics; in eval mode and in the state dict it is a plain BatchNorm2d.
    Raises ValueError at a training batch that ``num_splits`` does not divide.
    """

    def __init__(self, num_features: int, num_splits: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if num_splits < 1:
            raise ValueError(f"num_splits is {num_splits}; it must be at least 1 (1 is plain BatchNorm)")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.num_splits = num_splits

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, S, S) in, the same out."""
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
        assert buffer is not None  # running statistics are always tracked here
        return buffer

    def extra_repr(self) -> str:
        """What BatchNorm2d shows, and the number of splits."""
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def _channels_first_to_last(x: Tensor) -> Tensor:
    """The dense memory of a channels_last image batch, so that rows can be moved without another copy."""
    return x.movedim(1, -1).contiguous() if x.dim() == 4 else x.contiguous()


def _channels_last_to_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1) if x.dim() == 4 else x


def deal_over_splits(x: Tensor, num_splits: int) -> Tensor:
    """Reorder (N, …) so that each of ``num_splits`` consecutive parts draws evenly from all former parts.

    Image batches come back channels_last. Raises ValueError where ``num_splits`` does not divide N.
    """
    _check_divisible(len(x), num_splits)
    rows = _channels_first_to_last(x)
    dealt = rows.unflatten(0, (num_splits, -1)).transpose(0, 1).flatten(0, 1)
    return _channels_last_to_first(dealt)


def undeal_over_splits(x: Tensor, num_splits: int) -> Tensor:
    """Undo `deal_over_splits`."""
    rows = _channels_first_to_last(x)
    gathered = rows.unflatten(0, (-1, num_splits)).transpose(0, 1).flatten(0, 1)
    return _channels_last_to_first(gathered)


def join_branches(branches: Sequence[Tensor], num_splits: int) -> Tensor:
    """One batch of B batches (N, …), of whose consecutive parts each has its share of every one.

    Image batches come back channels_last. Raises ValueError where ``num_splits`` does not divide N.
    """
    _check_divisible(len(branches[0]), num_splits)
    parts_BG = [_channels_first_to_last(x).chunk(num_splits) for x in branches]
    in_order = [part for parts_B in zip(*parts_BG, strict=True) for part in parts_B]
    return _channels_last_to_first(torch.cat(in_order))


def part_branches(x: Tensor, num_branches: int, num_splits: int) -> list[Tensor]:
    """Undo `join_branches` for rows (B·N, D) made of its rows."""
    x_GBnD = x.unflatten(0, (num_splits, num_branches, -1))
    return [x_GBnD[:, branch].flatten(0, 1) for branch in range(num_branches)]


def _hand_sizes(num_rows: int, rank: int, world_size: int) -> list[int]:
    """How many rows ``rank`` sends to each rank. Row and column sums of the R × R table are ``num_rows``."""
    share, rest = divmod(num_rows, world_size)
    return [share + ((to - rank) % world_size < rest) for to in range(world_size)]


def _exchange(x: Tensor, send: list[int], receive: list[int]) -> Tensor:
    rows = _channels_first_to_last(x)
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, output_split_sizes=receive, input_split_sizes=send)
    return _channels_last_to_first(received)


def shuffle_across_ranks(x: Tensor) -> Tensor:
    """Deal the (N, …) rows of every rank evenly over all ranks; N must be the same on all of them.

    Only rows that change their place travel (all-to-all), about N·(R − 1)/R of them, where gathering whole
    batches would bring in N·(R − 1). The deal is fixed: an epoch's order is random already, an even deal
    leaves the fewest old neighbours together, and there is no generator state to agree on or to resume.
    Image batches come back channels_last. No gradient passes. Needs an initialised process group.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    send = _hand_sizes(len(x), rank, world_size)
    receive = [_hand_sizes(len(x), source, world_size)[rank] for source in range(world_size)]
    return _exchange(x, send, receive)


def unshuffle_across_ranks(x: Tensor) -> Tensor:
    """Undo `shuffle_across_ranks`: row i is again what belongs to row i of this rank's batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    receive = _hand_sizes(len(x), rank, world_size)
    send = [_hand_sizes(len(x), source, world_size)[rank] for source in range(world_size)]
    return _exchange(x, send, receive)
