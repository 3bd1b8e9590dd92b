"""Who am I among the processes of a run: read from torchrun's environment, set up and torn down once."""

import contextlib
import datetime
import gc
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from models.batchnorm import missing_for_kernels
from training.precision import settings_of_training

_ROWS_AT_A_TIME = 65_536
"""Of a gathered tensor in one message."""


class ProcessLost(Exception):
    """A collective failed, because another process of the run has died or hangs; told in a sentence."""


@dataclass(frozen=True)
class Launch:
    """One process's place in the run and the device it computes on."""

    rank: int
    """Of all processes, 0 … world_size − 1."""
    world_size: int
    """Processes in the run."""
    local_rank: int
    """Of the processes on this machine; the number of its GPU."""
    device: torch.device
    """Where models and batches live."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here; returns at once for a single one."""
        if self.world_size > 1:
            dist.barrier()

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Rows of all processes, those of rank 0 first, on the main process; None on the others.

        rows: (n, …) on the CPU, where they stay; n may differ, and be 0, the rest not. Returns (Σ n, …).
        """
        if self.world_size == 1:
            return rows
        # NCCL would take them through a GPU, which may have no room.
        group: dist.ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor(len(rows)), group=group)
        gathered = None
        if self.is_main:
            gathered = rows.new_empty(int(sum(counts)), *rows.shape[1:])
            shares = gathered.split([int(count) for count in counts])
            shares[0].copy_(rows)
            for rank, share in enumerate(shares[1:], start=1):
                for block in share.split(_ROWS_AT_A_TIME) if len(share) else ():
                    dist.recv(block, src=rank, group=group)
        else:
            for block in rows.contiguous().split(_ROWS_AT_A_TIME) if len(rows) else ():
                dist.send(block, dst=0, group=group)
        dist.destroy_process_group(group)
        return gathered


def _number_from_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {name} is {text!r}; it must be a whole number (torchrun sets it)"
        )
    return int(text)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device named "auto" (a GPU where there is one), "cpu" or "cuda"; on cuda, GPU ``local_rank``.

    Raises ValueError for another name, for "cuda" without a usable GPU, and for more processes than GPUs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device is {device!r}; choose auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError(
            "device is 'cuda', but PyTorch sees no GPU here; take 'cpu' or 'auto', or check nvidia-smi"
        )
    if device == "cpu" or not has_gpu:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own, this machine shows {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()} or fewer"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def init_launch(device: str = "auto", timeout_s: float = 1800) -> Iterator[Launch]:
    """Join the run that torchrun started, or be a run of one; leave it at the end of the ``with`` block.

    device: see `choose_device`. Processes talk over NCCL on GPUs, over gloo on CPUs.
    timeout_s: how long a collective waits for a missing process before it fails.
    Raises ProcessLost in place of a collective's error. Where the block fails, the group is not left: that
    could wait for the dead, so the process should end soon, see `training.failure.ending_at_once`.
    """
    rank = _number_from_environment("RANK", 0)
    world_size = _number_from_environment("WORLD_SIZE", 1)
    local_rank = _number_from_environment("LOCAL_RANK", 0)
    launch = Launch(rank, world_size, local_rank, choose_device(device, local_rank))
    on_gpu = launch.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(launch.device)
    if world_size == 1:
        with settings_of_training(), _kernels_or_warning(launch):
            yield launch
        return
    with settings_of_training(), _kernels_or_warning(launch), _losses_told():
        _join(launch, datetime.timedelta(seconds=timeout_s))
        yield launch
        # What still holds the group, such as DDP's reducer in a cycle of references, would keep gloo's
        # threads alive into the interpreter's end, where one that lets go of a tensor aborts the process:
        # pytorch's issue 190489.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


@contextlib.contextmanager
def _kernels_or_warning(launch: Launch) -> Iterator[None]:
    """Where GPU kernels cannot be compiled, say so once and run what would be compiled as it stands."""
    why = missing_for_kernels() if launch.device.type == "cuda" else ""
    if not why:
        yield
        return
    if launch.is_main:
        sys.stderr.write(
            f"warning: GPU kernels cannot be compiled here, for {why}. Until then BatchNorm in parts, the "
            "augmentation on the GPU and --compile run operation by operation, which is slower\n"
        )
    with torch.compiler.set_stance("force_eager"):
        yield


def _join(launch: Launch, timeout: datetime.timedelta) -> None:
    """Set up the process group, apart from what earlier starts of the run left behind.

    torchrun keeps its store through restarts, and with it the addresses of the dead. On one machine the
    number of the start tells them apart; several machines do not always count alike.
    """
    on_gpu = launch.device.type == "cuda"
    start, num_machines = (
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        os.environ.get("GROUP_WORLD_SIZE"),
    )
    store = None
    if start != "0" and num_machines == "1":
        shared, _, _ = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start-{start}", shared)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timeout,
        store=store,
        rank=launch.rank if store else -1,
        world_size=launch.world_size if store else -1,
        device_id=launch.device if on_gpu else None,
    )


_OF_GLOO = re.compile(r"\[\S*gloo/transport/\S+:\d+\]")
"""How messages of gloo's connections begin; NCCL's and the store's errors have types of their own."""


@contextlib.contextmanager
def _losses_told() -> Iterator[None]:
    """Turn the failure of a collective into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _OF_GLOO.match(str(error)):
            raise
        reason = re.sub(r"^\[[^]]*\]\s*", "", str(error)).splitlines()[0].split(". ")[0]
        raise ProcessLost(
            f"lost the connection to the run's other processes ({reason}): one of them has died or hangs; "
            "its own message stands above, or in the output of its machine; --resume continues from the last "
            "checkpoint"
        ) from error


def check_agreement(launch: Launch, step: int) -> None:
    """Refuse to go on where processes found different checkpoints to resume from."""
    if launch.world_size == 1:
        return
    steps = [torch.zeros((), dtype=torch.int64, device=launch.device) for _ in range(launch.world_size)]
    dist.all_gather(steps, torch.tensor(step, device=launch.device))
    if len({int(other) for other in steps}) > 1:
        raise ValueError(
            f"the processes would resume after different steps {[int(other) for other in steps]}; "
            "--out must lie on a file system that all nodes share"
        )
