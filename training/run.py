"""One training run: its parts, its state and its loop.

`train_pretrain.py` and `training.supervised` extend `Run` with their data and their model.
"""

import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.checkpoint import (
    TrainState,
    checkpoint_path,
    checkpoint_to_resume,
    generator_states,
    load_checkpoint,
    prune,
    restore_generators,
    save_checkpoint,
)
from training.cli import console
from training.distributed import Launch, StopRequest, check_agreement
from training.logs import NonFiniteLoss, RunLog, recovery_advice
from training.optim import ScheduleKind, lr_at, scale_lr
from training.precision import Precision, PrecisionName

CHANGEABLE = ("lr", "head_lr", "precision")
"""Settings that may change on resume, with a message. Changing them can cure a loss that is not finite."""
Metrics = Mapping[str, Tensor | float]
"""Metrics of one step: name → number or 0-d tensor."""

# ======================================================================================================
# Parts of a run
# ======================================================================================================


class Loader(Protocol):
    """The source of a run's batches; `pipelines.ViewLoader` is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next, from its start or from a loaded position."""

    def take_waited_s(self) -> float:
        """Seconds waited for batches since the last call."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a position. Raises ValueError for a position in another set or order."""


class RunConfig(Protocol):
    """The options that every run has; documented in `presets.PretrainConfig` and `SupervisedConfig`."""

    @property
    def out(self) -> Path:
        """Folder of the run."""

    @property
    def epochs(self) -> int:
        """Passes over the set."""

    @property
    def batch_size(self) -> int:
        """Images in a step over all processes."""

    @property
    def cos(self) -> bool:
        """Cosine schedule instead of steps."""

    @property
    def seed(self) -> int:
        """Seed of everything random."""

    @property
    def precision(self) -> PrecisionName:
        """Number format."""

    @property
    def resume(self) -> bool:
        """Continue from the newest checkpoint."""

    @property
    def log_every_s(self) -> float:
        """Seconds between rows of the log."""

    def milestones(self) -> tuple[float, ...]:
        """Shares of the run at which a step schedule drops."""


def prepare(config: RunConfig, launch: Launch) -> tuple[Precision, Path | None]:
    """Check the config and the run's folder, seed torch, and choose the precision.

    Returns:
        The precision, and the checkpoint to resume from, None for a new run.

    Raises:
        ValueError: for a batch size that the processes cannot share evenly, for a folder that already holds a
            run, and for a precision that the device lacks.
    """
    if config.batch_size % launch.world_size:
        raise ValueError(
            f"batch size {config.batch_size} cannot be shared evenly among {launch.world_size} processes; "
            "give a multiple of their number"
        )
    checkpoint = checkpoint_to_resume(config.out, config.resume)
    torch.manual_seed(config.seed)
    return Precision.choose(config.precision, launch.device), checkpoint


# ======================================================================================================
# Run
# ======================================================================================================


@dataclass(kw_only=True)
class Run:
    """The parts of a training and its progress."""

    config: RunConfig
    settings: dict[str, Any]
    """The options that decide the run's numbers, as JSON values; fixed on resume, except for `CHANGEABLE`."""
    launch: Launch
    precision: Precision
    loader: Loader
    model: nn.Module
    """The trained model, without DDP's wrapper."""
    optimizer: torch.optim.Optimizer
    """Made by `training.optim`."""
    step: int = 0
    """Steps done."""
    epoch: int = 0
    """Epoch of the next step."""
    about: ClassVar[str] = ""
    """Explanation of the metrics, shown in TensorBoard."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.epochs * len(self.loader)

    def meta(self) -> dict[str, str]:
        """The description of the model for a checkpoint."""
        return {}

    def distributed_model(self) -> nn.Module:
        """The model, wrapped by DDP if there are several processes; each process keeps its own buffers."""
        if self.launch.world_size == 1:
            return self.model
        # Newer versions of torch deprecate the option, but its replacement would still broadcast once at the
        # start.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedDataParallel(
            self.model,
            broadcast_buffers=False,
            # Gradients share the memory of the reduced buckets, and every step uses the same parameters.
            gradient_as_bucket_view=True,
            static_graph=True,
        )

    def update_lr(self) -> float:
        """Set the learning rates of the next step; returns that of the last parameter group."""
        config = self.config
        kind: ScheduleKind = "cosine" if config.cos else "step"
        share = lr_at(self.step, self.total_steps, 1.0, kind=kind, milestones=config.milestones())
        scale_lr(self.optimizer, share)
        rate: float = share * self.optimizer.param_groups[-1]["initial_lr"]
        return rate

    # -------------------------------------------------------------------------------------------- state

    def state(self) -> TrainState:
        """Everything the run needs to continue."""
        return TrainState(
            step=self.step,
            epoch=self.epoch,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.precision.scaler.state_dict(),
            loader=self.loader.state_dict(),
            generators=generator_states(),
            config=self.settings,
            meta=self.meta(),
        )

    def save(self, keep: int) -> None:
        """Write a checkpoint and delete all but the ``keep`` newest ones; on the main process only."""
        if self.launch.is_main:
            save_checkpoint(checkpoint_path(self.config.out, self.step), self.state())
            prune(self.config.out, keep)

    def resume(self, checkpoint: Path | None) -> None:
        """Restore a checkpoint, if there is one, and check that all processes are at the same step."""
        if checkpoint:
            self.restore(checkpoint)
            print_once(self.launch, f"continuing after step {self.step} of {self.total_steps}")
        check_agreement(self.launch, self.step)

    def restore(self, checkpoint: Path) -> dict[str, str]:
        """Load the state that `state` returned; learning rates come from the config.

        Returns:
            The checkpoint's meta.

        Raises:
            CheckpointError: for a file that cannot be read, and for settings that differ.
            ValueError: for another set.
        """
        changeable = [name for name in CHANGEABLE if name in self.settings]
        state = load_checkpoint(checkpoint, self.settings, may_differ=changeable)
        self.model.load_state_dict(state.model)
        rates = [(group["lr"], group["initial_lr"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state.optimizer)
        for group, (lr, initial_lr) in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"], group["initial_lr"] = lr, initial_lr
        if state.scaler and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state.scaler)
        self.loader.load_state_dict(state.loader)
        restore_generators(state.generators)
        self.step, self.epoch = state.step, state.epoch
        for name in changeable:
            if state.config[name] != self.settings[name]:
                change = f"{name} is {self.settings[name]} from here on, it was {state.config[name]}"
                print_once(self.launch, change)
        return state.meta

    # --------------------------------------------------------------------------------------------- loop

    def train(
        self,
        train_step: Callable[[Any], Metrics],
        after_epoch: Callable[[RunLog, bool], None],
        before: Callable[[RunLog], None] = lambda _: None,
    ) -> bool:
        """Train to the end of the schedule, or until a stop is requested.

        Args:
            train_step: takes a batch and returns the metrics of the step.
            after_epoch: saves and evaluates; called after each epoch with False, and with True after the step
                at which the run stops.
            before: called before the first step.

        Returns:
            Whether the end was reached.

        Raises:
            NonFiniteLoss: for a loss or weights that are not finite.
        """
        log = RunLog(
            self.config.out,
            self.launch.is_main,
            total_steps=self.total_steps,
            first_step=self.step,
            every_s=self.config.log_every_s,
            about=self.about,
        )
        with StopRequest() as stop, log:
            self.model.train()
            before(log)
            while self.epoch < self.config.epochs and not stop.requested:
                self._train_epoch(train_step, log, stop)
                after_epoch(log, stop.requested)
        if stop.requested:
            command = resume_command(self.launch, resumed=self.config.resume)
            print_once(self.launch, f"stopped after step {self.step} of {self.total_steps}; {command}")
        return not stop.requested

    def _train_epoch(self, train_step: Callable[[Any], Metrics], log: RunLog, stop: StopRequest) -> None:
        self.loader.set_epoch(self.epoch)
        for batch in self.loader:
            metrics = train_step(batch)
            wait_s = self.loader.take_waited_s()
            log.step(self.step, metrics, epoch=self.epoch, samples=self.config.batch_size, wait_s=wait_s)
            self.step += 1
            if stop.agreed(self.launch, exchange=self.step % 10 == 0):
                break
        else:
            self.epoch += 1
            stop.agreed(self.launch, exchange=True)
        log.flush()
        # The last step may have made the weights non-finite although its loss was finite.
        trained = list[Tensor](p for p in self.model.parameters() if p.requires_grad)
        if not torch.stack(torch._foreach_norm(trained)).isfinite().all():
            advice = recovery_advice(self.config.out)
            raise NonFiniteLoss(f"the weights are not finite after step {self.step}; {advice}")


def due(epoch: int, every: int, last: int) -> bool:
    """Whether a task is due after ``epoch`` epochs: it is due every ``every`` epochs, and after the last."""
    return epoch > 0 and (epoch % every == 0 or epoch == last)


def resume_command(launch: Launch, *, resumed: bool) -> str:
    """Advice on resuming a stopped run; ``resumed``: whether its command line already has --resume."""
    flags = [] if resumed else ["--resume"]
    if launch.world_size > 1:  # sys.orig_argv is a worker's command line, not torchrun's
        return " ".join(["continue with the same torchrun command", *(["and"] if flags else []), *flags])
    return f"continue with\n    {shlex.join([*sys.orig_argv, *flags])}"


def print_once(launch: Launch, line: str) -> None:
    """Print a line on the main process only."""
    if launch.is_main:
        console.print(line)
