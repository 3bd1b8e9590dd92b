"""Keeping batch statistics from giving the positive pair away.

BatchNorm lets images of one batch see each other. If a query and its key are normalised in the same
company, the network can match them by that company and learn nothing. So the company of the keys is
changed: the batch is dealt out anew, over ranks or over the groups of a `SplitBatchNorm2d`.

Shape letters: N batch on this rank, C channels, S side, G groups, R ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _check_divisible(batch_size: int, num_splits: int) -> None:
    if batch_size % num_splits:
        raise ValueError(
            f"a batch of {batch_size} cannot be split into {num_splits} equal parts for BatchNorm; "
            f"choose a batch size that is a multiple of {num_splits}, or fewer splits"
        )


def _normalise_parts(
    input: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    means_GC: Tensor,
    vars_GC: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Each of G consecutive parts of (N, C, S, S), normalised by itself; running statistics move in place."""
    parts = zip(input.chunk(len(means_GC)), means_GC, vars_GC, strict=True)
    return torch.cat(
        [
            F.batch_norm(part, mean_C, var_C, weight_C, bias_C, True, momentum, eps)
            for part, mean_C, var_C in parts
        ]
    )


class _NormaliseParts(torch.autograd.Function):
    """`_normalise_parts`, each part written where it belongs: nothing is copied to join them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        means_GC: Tensor,
        vars_GC: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """As `_normalise_parts`; each part's own statistics are kept for the gradient."""
        output = torch.empty_like(input)
        mean_GC, inverse_std_GC = torch.empty_like(means_GC), torch.empty_like(means_GC)
        num = len(means_GC)
        for g, (part, out) in enumerate(zip(input.chunk(num), output.chunk(num), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                *(part, weight_C, bias_C, means_GC[g], vars_GC[g], True, momentum, eps),
                out=out,
                save_mean=mean_GC[g],
                save_invstd=inverse_std_GC[g],
            )
        ctx.save_for_backward(input, weight_C, mean_GC, inverse_std_GC)
        ctx.eps = eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by input, weight and bias, the last two summed over the parts."""
        input, weight_C, mean_GC, inverse_std_GC = ctx.saved_tensors
        num = len(mean_GC)
        input_parts, weight_parts, bias_parts = zip(
            *(
                torch.ops.aten.native_batch_norm_backward(
                    *(grad, part, weight_C, None, None, mean_C, inverse_std_C, True, ctx.eps),
                    [ctx.needs_input_grad[0], True, True],
                )
                for grad, part, mean_C, inverse_std_C in zip(
                    grads[0].chunk(num), input.chunk(num), mean_GC, inverse_std_GC, strict=True
                )
            ),
            strict=True,
        )
        input_grad = torch.cat(input_parts) if ctx.needs_input_grad[0] else None
        return input_grad, sum(weight_parts), sum(bias_parts), None, None, None, None


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
        # Each part updates a copy of the running statistics, and the copies are averaged.
        means_GC = self._running(self.running_mean).repeat(self.num_splits, 1)
        vars_GC = self._running(self.running_var).repeat(self.num_splits, 1)
        # Measured on CPUs alone; a compiler fuses the parts by itself.
        in_place = input.device.type == "cpu" and not torch.compiler.is_compiling()
        normalise = _NormaliseParts.apply if in_place else _normalise_parts
        output: Tensor = normalise(
            input, self.weight, self.bias, means_GC, vars_GC, self.momentum or 0.0, self.eps
        )
        with torch.no_grad():
            self._running(self.running_mean).copy_(means_GC.mean(0))
            self._running(self.running_var).copy_(vars_GC.mean(0))
            self._running(self.num_batches_tracked).add_(1)
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
