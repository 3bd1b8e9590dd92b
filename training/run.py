"""What every training has, whatever it trains: its parts, and the state it goes on from."""

import shlex
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.checkpoint import TrainState, generator_states, load_checkpoint, restore_generators
from training.cli import console
from training.distributed import Launch
from training.precision import Precision


class Loader(Protocol):
    """What feeds a run; `pipelines.ViewLoader` is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next, at its start or where a state left it."""

    def take_waited_s(self) -> float:
        """Seconds waited for batches since this was asked last."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the cursor back. Raises ValueError if it is of another set or order."""


class Run(Protocol):
    """A training, and how far it has come."""

    step: int
    """Steps done."""
    epoch: int
    """Epoch the next step belongs to."""

    @property
    def launch(self) -> Launch:
        """The run's processes."""

    @property
    def out(self) -> Path:
        """The run's folder."""

    @property
    def loader(self) -> Loader:
        """Of batches of this process."""

    @property
    def model(self) -> nn.Module:
        """What is trained, without DDP's wrapper."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of its parameters; made by `training.optimizer`."""

    @property
    def precision(self) -> Precision:
        """With the gradient scaler."""

    @property
    def num_epochs(self) -> int:
        """Of the whole schedule."""

    @property
    def global_batch(self) -> int:
        """Samples in a step over all processes."""


def shared_among_processes(run: Run) -> nn.Module:
    """The model, whose gradients become means over all processes; each has buffers of its own."""
    if run.launch.world_size == 1:
        return run.model
    # Its replacement in newer versions of torch would still broadcast once at the start.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    return DistributedDataParallel(
        run.model,
        broadcast_buffers=False,
        # Gradients lie in the buckets that are reduced, and every step uses the same parameters.
        gradient_as_bucket_view=True,
        static_graph=True,
    )


def state_of(run: Run, config: dict[str, Any], meta: dict[str, str]) -> TrainState:
    """Everything a run needs to go on; config and meta as `TrainState` has them."""
    return TrainState(
        step=run.step,
        epoch=run.epoch,
        model=run.model.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.precision.scaler.state_dict(),
        loader=run.loader.state_dict(),
        generators=generator_states(),
        config=config,
        meta=meta,
    )


def restore(
    run: Run, checkpoint: Path, config: Mapping[str, Any], changeable: Collection[str]
) -> dict[str, str]:
    """Put everything back as `state_of` took it; returns the meta.

    changeable: keys of the config that may have changed, which is told; learning rates are the present ones.
    Raises CheckpointError for a file that cannot be read and for a config that differs in other keys, and
    ValueError for another set.
    """
    state = load_checkpoint(checkpoint, config, may_differ=changeable)
    run.model.load_state_dict(state.model)
    rates = [(group["lr"], group["initial_lr"]) for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(state.optimizer)
    for group, (lr, initial_lr) in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"] = lr, initial_lr
    if state.scaler and run.precision.scaler.is_enabled():
        run.precision.scaler.load_state_dict(state.scaler)
    run.loader.load_state_dict(state.loader)
    restore_generators(state.generators)
    run.step, run.epoch = state.step, state.epoch
    for name in changeable:
        if state.config[name] != config[name]:
            say(run.launch, f"{name} is {config[name]} from here on, it was {state.config[name]}")
    return state.meta


def how_to_continue(launch: Launch, resumed: bool) -> str:
    """The line that resumes this process's stopped run; ``resumed``: whether it was resumed itself."""
    more = [] if resumed else ["--resume"]
    if launch.world_size > 1:  # our own words are a worker's, not torchrun's
        return " ".join(["continue with the same torchrun command", *(["and"] if more else []), *more])
    return f"continue with\n    {shlex.join([*sys.orig_argv, *more])}"


def say(launch: Launch, line: str) -> None:
    """Print a line, once for all processes."""
    if launch.is_main:
        console.print(line)
