"""A training step: forward, backward, optimizer; eager, compiled, or replayed as a CUDA graph.

A step has no host sync. The host queues at most two steps ahead of the device. This bounds the memory of
queued steps, and a run that is interrupted stops soon.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.precision import Precision

WARM_UP_STEPS = 3
"""Training steps on a side stream before the capture; CUDA graphs need this warm-up."""
_STEPS_AHEAD = 2

LossOf = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
TensorsOf = Callable[[Any], list[Tensor]]


class TrainStep:
    """Callable that trains on one batch.

    The learning rates are tensors that `training.optim.scale_lr` fills in place, so a compiled or captured
    step reads their current values.
    """

    def __init__(
        self,
        loss_of: LossOf,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        *,
        tensors_of: TensorsOf | None = None,
    ) -> None:
        """Prepare a step; nothing is computed yet.

        Args:
            loss_of: takes a batch and returns the loss and the metrics (0-d tensors without gradient).
            optimizer: of the trained parameters; made by `training.optim`.
            precision: of the forward pass.
            tensors_of: lists the tensors of a batch, always in the same order and shapes. If given, the step
                is captured as one CUDA graph after `WARM_UP_STEPS` steps and replayed from then on.

        Raises:
            ValueError: for a capture without a GPU, or under fp16; see `check_graph`.
        """
        if tensors_of is not None:
            check_graph(precision, world_size=1)
        self._loss_of, self._optimizer, self._precision = loss_of, optimizer, precision
        self._tensors_of = tensors_of
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps_done = 0
        # One stream for warm-up and capture, because memory freed on one stream is not reused on another.
        self._side_stream = torch.cuda.Stream(precision.device) if tensors_of is not None else None
        self._queued_steps: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Train on a batch; returns the metrics as new tensors on the device."""
        if self._tensors_of is None:
            metrics = self._compute(batch)
        elif self._steps_done < WARM_UP_STEPS:
            metrics = self._on_side_stream(batch)
        else:
            metrics = self._replay(batch, self._tensors_of)
        self._steps_done += 1
        self._wait_for_device()
        return metrics

    def _compute(self, batch: Any) -> dict[str, Tensor]:
        optimizer, scaler = self._optimizer, self._precision.scaler
        optimizer.zero_grad(set_to_none=True)
        with self._precision.autocast():
            loss, metrics = self._loss_of(batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return metrics

    def _on_side_stream(self, batch: Any) -> dict[str, Tensor]:
        assert self._side_stream is not None
        current = torch.cuda.current_stream()
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            metrics = self._compute(batch)
        current.wait_stream(self._side_stream)
        return {name: value.clone() for name, value in metrics.items()}

    def _replay(self, batch: Any, tensors_of: TensorsOf) -> dict[str, Tensor]:
        if self._graph is None:
            self._captured_batch = batch
            self._graph = torch.cuda.CUDAGraph()
            # Gradients are allocated inside the capture, so that their memory belongs to the graph.
            self._optimizer.zero_grad(set_to_none=True)
            # The loader's threads may use the device during the capture.
            capture = torch.cuda.graph(
                self._graph, stream=self._side_stream, capture_error_mode="thread_local"
            )
            with capture:
                self._metrics = self._compute(batch)
        else:
            for static, fresh in zip(tensors_of(self._captured_batch), tensors_of(batch), strict=True):
                static.copy_(fresh)
        self._graph.replay()
        return {name: value.clone() for name, value in self._metrics.items()}

    def _wait_for_device(self) -> None:
        """Sleep until the host is at most `_STEPS_AHEAD` steps ahead of the device."""
        if self._precision.device.type != "cuda":
            return
        done = torch.cuda.Event(blocking=True)
        done.record()
        self._queued_steps.append(done)
        if len(self._queued_steps) > _STEPS_AHEAD:
            self._queued_steps.popleft().synchronize()


def check_graph(precision: Precision, world_size: int) -> None:
    """Raise ValueError if a step cannot be captured as a CUDA graph.

    fp16 cannot, because its gradient scaler decides on the host whether to skip a step.
    """
    if precision.device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, this run computes on {precision.device}; leave it out")
    if precision.name == "fp16":
        raise ValueError("--cuda-graph cannot capture fp16's loss scaling; use --precision bf16 or fp32")
    if world_size > 1:
        raise ValueError(
            f"--cuda-graph captures the step of a single process, this run has {world_size}; use --compile"
        )
