"""A pretrained encoder with a classifier, trained on labels: what linear probe and fine-tuning share.

Shape letters: N batch, S side, C classes, F features.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from models.classifier import Classifier
from pipelines import Batch, ViewLoader, build_loader, evaluation_batches
from pipelines.recipe import linear_train
from training.accuracy import Accuracy, count_hits
from training.checkpoint import (
    TrainState,
    checkpoint_path,
    prune,
    save_checkpoint,
    to_resume,
)
from training.distributed import Launch, check_agreement
from training.export import BackboneMeta, fingerprint
from training.logs import RunLog
from training.loop import due, train_epochs
from training.optimizer import sgd_groups
from training.precision import Precision
from training.pretrained import LabelledSets, Pretrained, PretrainedConfig, labelled_sets, load_pretrained
from training.run import how_to_continue, restore, say, shared_among_processes, state_of
from training.schedule import ScheduleKind, lr_at, scale_lr, shares
from training.step import TrainStep
from training.stop import StopRequest

BEST = "best.pt"
"""The checkpoint that did best on the test set."""
CHANGEABLE = ("lr", "head_lr", "precision")
"""What a resumed run may have otherwise, and says so: it is what a loss that is not finite asks for."""
ABOUT = "top1 and top5 are shares of the test set; train_top1 is that of augmented training views."

# ======================================================================================================
# Config
# ======================================================================================================


@dataclass(frozen=True)
class SupervisedConfig(PretrainedConfig):
    """Train a classifier on a pretrained encoder."""

    epochs: int = 100
    """Passes over the training set."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 256
    """Pictures in a step over all processes."""
    schedule: tuple[int, ...] = ()
    """Epochs at which the rate drops to a tenth; by default 60 % and 80 % of the run."""
    cos: bool = False
    """A cosine in place of the drops."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 0.0
    """L2 penalty on all weights that are trained."""
    sgd_momentum: Annotated[float, tyro.conf.arg(aliases=["--momentum"])] = 0.9
    """Momentum of SGD."""
    resume: bool = False
    """Continue from the newest checkpoint in the run's folder, if there is one."""
    val_every_epochs: int = 1
    """Epochs between measurements on the test set; the last epoch always has one."""
    log_every_s: float = 5.0
    """Seconds between rows of the log."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "val_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.schedule and self.cos:
            raise ValueError("schedule has no effect on a cosine; leave one of them out")
        self.milestones()

    def milestones(self) -> tuple[float, ...]:
        """Shares of the run at which the rate drops."""
        return shares(self.schedule, self.epochs)

    def describe(self, encoder: BackboneMeta, sets: LabelledSets) -> BackboneMeta:  # noqa: ARG002
        """What is to be said of the encoder after this run: what was said of it before, if it is frozen."""
        return encoder

    def as_json(self) -> dict[str, Any]:
        """What decides the run's numbers beside its files, as plain data; a resumed run must agree on it."""
        files = {"data", "val", "pretrained", "out"}
        free = files | {"resume", "device", "num_threads", "val_every_epochs", "log_every_s"}
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {key: value for key, value in plain.items() if key not in free}


# ======================================================================================================
# Loop
# ======================================================================================================


@dataclass(frozen=True)
class Measured:
    """The test set's verdict so far."""

    epoch: int = 0
    """Of the newest measurement; 0 before the first."""
    accuracy: Accuracy | None = None
    """The newest; None before the first."""
    best_top1: float = -1.0
    """Over all epochs measured; below 0 before the first."""


@dataclass
class Training:
    """The parts of a training on labels, and how far it has come."""

    config: SupervisedConfig
    launch: Launch
    precision: Precision
    sets: LabelledSets
    loader: ViewLoader
    pretrained: Pretrained
    model: Classifier
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    epoch: int = 0
    """Epoch the next step belongs to."""
    measured: Measured = Measured()
    """On the test set."""
    start_s: float = dataclasses.field(default_factory=time.perf_counter)
    """When it began by this process's clock, were it not for interruptions."""

    @property
    def seconds(self) -> float:
        """Taken so far, without interruptions."""
        return time.perf_counter() - self.start_s

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.config.out

    @property
    def num_epochs(self) -> int:
        """Of the whole schedule."""
        return self.config.epochs

    @property
    def global_batch(self) -> int:
        """Pictures in a step over all processes."""
        return self.config.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.epochs * len(self.loader)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on; the loader itself compares the training sets."""
        files = {
            "encoder_sha256": fingerprint(self.pretrained.backbone.state),
            "test_set": self.sets.val_fingerprint,
        }
        return self.config.as_json() | files


def assemble(
    config: SupervisedConfig,
    launch: Launch,
    *,
    frozen: bool,
    base_lrs: tuple[float, float],
    subset: NDArray[np.int64] | None = None,
    sync_bn: bool = False,
) -> Training:
    """A training ready for its next step: the first one, or with --resume the one after the last checkpoint.

    Args:
        config: of the run.
        launch: of this process.
        frozen: train the classifier only.
        base_lrs: learning rates of encoder and classifier.
        subset: train on these pictures of the set only.
        sync_bn: have BatchNorm's statistics taken over all processes, which only GPUs can.
    """
    if sync_bn and launch.device.type == "cpu":
        raise ValueError("--sync-bn needs GPUs; leave it out on a CPU, where each process has its own BN")
    if config.out.resolve() == config.pretrained.parent.resolve():
        raise ValueError(f"--out {config.out} is the folder of --pretrained, whose files stay; give another")
    found = to_resume(config.out, config.resume)
    if config.batch_size % launch.world_size:
        raise ValueError(
            f"batch size {config.batch_size} cannot be shared evenly among {launch.world_size} processes"
        )
    torch.manual_seed(config.seed)
    precision = Precision.choose(config.precision, launch.device)
    sets = labelled_sets(config)
    pretrained = load_pretrained(config, launch.device)
    loader = build_loader(
        sets.train,
        linear_train(pretrained.view),
        config.backend,
        batch_size=config.batch_size // launch.world_size,
        seed=config.seed,
        rank=launch.rank,
        world_size=launch.world_size,
        device=launch.device,
        num_threads=config.num_threads,
        subset=subset,
    )
    model = Classifier(pretrained.encoder, pretrained.feature_dim, sets.num_classes, frozen=frozen)
    if sync_bn:
        model.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.encoder)
    model.to(launch.device)
    parts = list(zip((model.encoder, model.fc), base_lrs, strict=True))
    optimizer = sgd_groups(parts[frozen:], config.sgd_momentum, config.weight_decay)
    run = Training(config, launch, precision, sets, loader, pretrained, model, optimizer)
    if found:
        meta = restore(run, found, run.settings, [name for name in CHANGEABLE if name in run.settings])
        run.measured = _measured(meta)
        run.start_s -= float(meta["seconds"])
        say(launch, f"continuing after step {run.step} of {run.total_steps}")
    check_agreement(launch, run.step)
    return run


def fit(run: Training) -> bool:
    """Train to the end, or until a stop is asked for; whether the end was reached."""
    config, launch = run.config, run.launch
    forward = shared_among_processes(run)
    step = TrainStep(functools.partial(loss_and_metrics, forward), run.optimizer, run.precision)
    with (
        StopRequest() as stop,
        RunLog(
            config.out,
            launch.is_main,
            total_steps=run.total_steps,
            first_step=run.step,
            every_s=config.log_every_s,
            about=ABOUT,
        ) as log,
    ):
        run.model.train()
        measure_if_due(run, log)  # the run may have been stopped just before it
        for _ in train_epochs(run, functools.partial(train_step, run, step), log, stop):
            if not stop.requested:
                measure_if_due(run, log)
            save(run)
    if stop.requested:
        more = how_to_continue(launch, config.resume)
        say(launch, f"stopped after step {run.step} of {run.total_steps}; {more}")
    return not stop.requested


def loss_and_metrics(forward: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropy of a batch, and the metrics of the step."""
    logits_NC: Tensor = forward(batch.query)
    loss = F.cross_entropy(logits_NC, batch.label)
    train_top1 = (logits_NC.detach().argmax(1) == batch.label).float().mean()
    return loss, {"loss": loss.detach(), "train_top1": train_top1}


def train_step(run: Training, step: TrainStep, batch: Batch) -> dict[str, Tensor | float]:
    """One step of the optimizer; metrics stay on the device."""
    config, optimizer = run.config, run.optimizer
    kind: ScheduleKind = "cosine" if config.cos else "step"
    share = lr_at(run.step, run.total_steps, 1.0, kind=kind, milestones=config.milestones())
    scale_lr(optimizer, share)
    return step(batch) | {"lr": share * optimizer.param_groups[-1]["initial_lr"]}


def measure_if_due(run: Training, log: RunLog) -> None:
    """Log the accuracy on the test set after every few epochs; the best state so far is kept as best.pt."""
    config, launch, before = run.config, run.launch, run.measured
    if before.epoch == run.epoch or not due(run.epoch, config.val_every_epochs, config.epochs):
        return
    log.busy(f"epoch {run.epoch}  measuring on {run.sets.val}")
    accuracy = measure(run)
    run.measured = Measured(run.epoch, accuracy, max(accuracy.top1, before.best_top1))
    log.event({"kind": "eval", "epoch": run.epoch, **vars(accuracy), "best_top1": run.measured.best_top1})
    if accuracy.top1 > before.best_top1 and launch.is_main:
        save_checkpoint(config.out / BEST, training_state(run))


@torch.no_grad()
def measure(run: Training) -> Accuracy:
    """Accuracy on the test set, of which each process takes a share."""
    launch = run.launch
    if launch.world_size > 1:
        # Processes gather BatchNorm statistics of their own, and all must measure one model.
        for buffer in run.model.buffers():
            dist.broadcast(buffer, 0)
    run.model.eval()
    batches = evaluation_batches(
        run.sets.val,
        run.pretrained.view,
        device=launch.device,
        num_threads=run.config.num_threads,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    hits_3 = torch.zeros(3, dtype=torch.int64, device=launch.device)
    for images, label_N in batches:
        with run.precision.autocast():
            logits_NC = run.model(images)
        hits_3 += count_hits(logits_NC, label_N)
    if launch.world_size > 1:
        dist.all_reduce(hits_3)
    run.model.train()
    return Accuracy.of(hits_3)


# ======================================================================================================
# State
# ======================================================================================================


def training_state(run: Training) -> TrainState:
    """Everything a training needs to go on; `_measured` is its inverse for the measurements."""
    measured = json.dumps(dataclasses.asdict(run.measured))
    meta = run.config.describe(run.pretrained.backbone.meta, run.sets)
    return state_of(
        run, run.settings, meta.as_strings() | {"measured": measured, "seconds": str(run.seconds)}
    )


def _measured(meta: Mapping[str, str]) -> Measured:
    said = json.loads(meta["measured"])
    accuracy = Accuracy(**said["accuracy"]) if said["accuracy"] else None
    return Measured(said["epoch"], accuracy, said["best_top1"])


def save(run: Training) -> None:
    """Write the state in place of the last one."""
    if run.launch.is_main:
        save_checkpoint(checkpoint_path(run.config.out, run.step), training_state(run))
        prune(run.config.out, keep=1)
