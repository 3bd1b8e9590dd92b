"""The processes of a run: rank and device from torchrun's environment, the process group, agreement.

A run without torchrun is a run of one process.
"""

import contextlib
import datetime
import gc
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from models.batchnorm import missing_for_kernels
from training.precision import settings_of_training

_ROWS_PER_MESSAGE = 65_536
"""Rows in one message when a tensor is gathered."""
_GLOO_ERROR = re.compile(r"\[\S*gloo/transport/\S+:\d+\]")
"""Start of the messages of gloo's connection errors, which have no type of their own."""


class ProcessLost(Exception):
    """A collective operation failed because another process of the run died or hangs."""


# ======================================================================================================
# This process
# ======================================================================================================


@dataclass(frozen=True)
class Launch:
    """This process's rank and device."""

    rank: int
    """Rank among all processes, 0 … world_size − 1."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank among the processes on this machine, and the index of its GPU."""
    device: torch.device
    """Device of models and batches."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Concatenate the rows of all processes by rank, on the main process.

        Args:
            rows: (n, …) on the CPU. n may differ between processes and may be 0; the other sizes may not.

        Returns:
            (Σ n, …) on the CPU; None on the other processes.
        """
        if self.world_size == 1:
            return rows
        # Not NCCL: it sends from GPU memory, which may be too small for the rows.
        group: dist.ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor(len(rows)), group=group)
        gathered = None
        if self.is_main:
            gathered = rows.new_empty(int(sum(counts)), *rows.shape[1:])
            shares = gathered.split([int(count) for count in counts])
            shares[0].copy_(rows)
            for rank, share in enumerate(shares[1:], start=1):
                for block in share.split(_ROWS_PER_MESSAGE) if len(share) else ():
                    dist.recv(block, src=rank, group=group)
        else:
            for block in rows.contiguous().split(_ROWS_PER_MESSAGE) if len(rows) else ():
                dist.send(block, dst=0, group=group)
        dist.destroy_process_group(group)
        return gathered


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu" or "cuda"; the GPU has the index ``local_rank``.

    Raises:
        ValueError: for another name, for "cuda" without a usable GPU, and for more processes than GPUs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device is {device!r}; choose auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError(
            "device is 'cuda', but PyTorch sees no GPU here; use 'cpu' or 'auto', or check nvidia-smi"
        )
    if device == "cpu" or not has_gpu:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own, this machine has {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()} or fewer"
        )
    return torch.device("cuda", local_rank)


# ======================================================================================================
# Process group
# ======================================================================================================


@contextlib.contextmanager
def init_launch(device: str = "auto", timeout_s: float = 1800) -> Iterator[Launch]:
    """Join the run that torchrun started, or start a run of one process; leave it at the end of the block.

    If the block fails, the process group is not destroyed, because that could wait for dead processes. The
    process should then exit soon; see `training.failure.exit_on_failure`.

    Args:
        device: see `choose_device`. The backend is NCCL on GPUs and gloo on CPUs.
        timeout_s: how long a collective operation waits for a missing process.

    Raises:
        ProcessLost: in place of the error of a collective operation.
    """
    rank = _environment_number("RANK", 0)
    world_size = _environment_number("WORLD_SIZE", 1)
    local_rank = _environment_number("LOCAL_RANK", 0)
    launch = Launch(rank, world_size, local_rank, choose_device(device, local_rank))
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
    if world_size == 1:
        with settings_of_training(), _kernels_or_eager(launch):
            yield launch
        return
    with settings_of_training(), _kernels_or_eager(launch), _raise_process_lost():
        _init_process_group(launch, datetime.timedelta(seconds=timeout_s))
        yield launch
        # DDP's reducer holds the group and is part of a reference cycle. Without a collection, gloo's threads
        # would run until the interpreter ends, and abort the process if they free a tensor then (pytorch
        # issue 190489).
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {name} is {text!r}; it must be a whole number (torchrun sets it)"
        )
    return int(text)


@contextlib.contextmanager
def _kernels_or_eager(launch: Launch) -> Iterator[None]:
    """If GPU kernels cannot be compiled, warn once and run the compiled functions eagerly."""
    reason = missing_for_kernels() if launch.device.type == "cuda" else ""
    if not reason:
        yield
        return
    if launch.is_main:
        sys.stderr.write(
            f"warning: GPU kernels cannot be compiled here: {reason}. This makes split BatchNorm, the "
            "augmentation on the GPU and --compile slower, because they run operation by operation\n"
        )
    with torch.compiler.set_stance("force_eager"):
        yield


def _init_process_group(launch: Launch, timeout: datetime.timedelta) -> None:
    """Set up the process group under a store prefix for this start of the run.

    torchrun's store survives restarts and still holds the addresses of dead processes. On one machine, the
    restart count is the prefix that separates the starts. Several machines may have different counts, so a
    run on them has no prefix.
    """
    on_gpu = launch.device.type == "cuda"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = None
    if restart != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        shared, _, _ = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start-{restart}", shared)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timeout,
        store=store,
        rank=launch.rank if store else -1,
        world_size=launch.world_size if store else -1,
        device_id=launch.device if on_gpu else None,
    )


@contextlib.contextmanager
def _raise_process_lost() -> Iterator[None]:
    """Raise ProcessLost in place of the error of a collective operation."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _GLOO_ERROR.match(str(error)):
            raise
        reason = re.sub(r"^\[[^]]*\]\s*", "", str(error)).splitlines()[0].split(". ")[0]
        raise ProcessLost(
            f"lost the connection to the run's other processes ({reason}): one of them died or hangs; see "
            "its message above or in the output of its machine; --resume continues from the last checkpoint"
        ) from error


# ======================================================================================================
# Agreement
# ======================================================================================================


def check_agreement(launch: Launch, step: int) -> None:
    """Raise ValueError if the processes resume from checkpoints of different steps."""
    if launch.world_size == 1:
        return
    steps = [torch.zeros((), dtype=torch.int64, device=launch.device) for _ in range(launch.world_size)]
    dist.all_gather(steps, torch.tensor(step, device=launch.device))
    if len({int(other) for other in steps}) > 1:
        raise ValueError(
            f"the processes would resume after different steps {[int(other) for other in steps]}; "
            "--out must be on a file system that all nodes share"
        )


class StopRequest:
    """Records SIGTERM and SIGINT, so that all processes end the loop after the same step.

    A context manager; the former signal handlers are restored at its end. If SIGINT was ignored, it stays
    ignored: shells ignore it in background jobs, which Ctrl-C must not stop. If one of several processes
    fails, the handlers stay, because torchrun then sends SIGTERM, which must not interrupt error messages.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the processes have agreed to stop."""
        self._signalled = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._former[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and dist.is_initialized():
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _record(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def agreed(self, launch: Launch, *, exchange: bool) -> bool:
        """Whether to stop now; the processes exchange their signals only if ``exchange`` is set.

        The exchange is a collective operation: all processes must set it after the same steps. A single
        process does not need it.
        """
        if launch.world_size == 1:
            self.requested = self._signalled
        elif exchange:
            flag = torch.tensor(self._signalled, device=launch.device, dtype=torch.uint8)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.requested = bool(flag)
        return self.requested
