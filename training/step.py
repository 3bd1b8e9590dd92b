"""A training step on the device: forward, backward, optimizer; eager, compiled, or replayed as a CUDA graph.

Nothing in a step waits for the device. The host may queue two steps ahead of it and no more, so memory does
not grow with the queue and a stopped run does not have to wait for seconds of queued work.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.precision import Precision

WARM_UP_STEPS = 3
"""Steps on a side stream before a capture, as CUDA graphs need; they are real training steps."""
_STEPS_AHEAD = 2

LossOf = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
TensorsOf = Callable[[Any], list[Tensor]]


class TrainStep:
    """One step of an optimizer on a batch; call it with batch after batch.

    The learning rates are those of the optimizer, tensors that `training.optim.scale_lr` fills in place, so
    that a compiled or captured step reads the present value.
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
            loss_of: takes a batch, returns the loss and the step's metrics (0-d tensors without gradient).
            optimizer: over the trained parameters; made by `training.optim`.
            precision: under which the loss is computed.
            tensors_of: lists a batch's tensors, always in the same order and shapes. Where it is given, the
                step is captured as one CUDA graph after `WARM_UP_STEPS` steps, and replayed from then on.

        Raises:
            ValueError: if a capture is asked for where there is no GPU, or under fp16, whose gradient scaler
                decides on the host.
        """
        if tensors_of is not None:
            check_graph(precision, world_size=1)
        self._loss_of, self._optimizer, self._precision = loss_of, optimizer, precision
        self._tensors_of = tensors_of
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps_done = 0
        # One stream for warm-up and capture: memory that one stream has freed does not serve another.
        self._side = torch.cuda.Stream(precision.device) if tensors_of is not None else None
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Train on a batch; returns the metrics, on the device, in memory of their own."""
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
        assert self._side is not None
        present = torch.cuda.current_stream()
        self._side.wait_stream(present)
        with torch.cuda.stream(self._side):
            metrics = self._compute(batch)
        present.wait_stream(self._side)
        return {name: value.clone() for name, value in metrics.items()}

    def _replay(self, batch: Any, tensors_of: TensorsOf) -> dict[str, Tensor]:
        if self._graph is None:
            self._static = batch
            self._graph = torch.cuda.CUDAGraph()
            # Gradients are made anew inside the capture, so their memory belongs to the graph.
            self._optimizer.zero_grad(set_to_none=True)
            # Other threads of the loader may use the device while this one captures.
            capture = torch.cuda.graph(self._graph, stream=self._side, capture_error_mode="thread_local")
            with capture:
                self._metrics = self._compute(batch)
        else:
            for static, fresh in zip(tensors_of(self._static), tensors_of(batch), strict=True):
                static.copy_(fresh)
        self._graph.replay()
        return {name: value.clone() for name, value in self._metrics.items()}

    def _wait_for_device(self) -> None:
        """Let the host be at most `_STEPS_AHEAD` steps ahead; it sleeps meanwhile instead of spinning."""
        if self._precision.device.type != "cuda":
            return
        done = torch.cuda.Event(blocking=True)
        done.record()
        self._queued.append(done)
        if len(self._queued) > _STEPS_AHEAD:
            self._queued.popleft().synchronize()


def check_graph(precision: Precision, world_size: int) -> None:
    """Raise ValueError, in a sentence, where a step cannot be captured as a CUDA graph."""
    if precision.device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, this run computes on {precision.device}; leave it out")
    if precision.name == "fp16":
        raise ValueError("--cuda-graph cannot capture fp16's scaling; take --precision bf16 or fp32")
    if world_size > 1:
        raise ValueError(
            f"--cuda-graph captures the step of a single process, this run has {world_size}; take --compile"
        )
