"""Training on labels: a pretrained encoder with a classifier, shared by linear probe and fine-tuning.

Shape letters: N batch, C classes.
"""

import dataclasses
import functools
import json
import time
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
from training.checkpoint import save_checkpoint
from training.distributed import Launch
from training.evaluate import Accuracy, count_hits
from training.export import BackboneMeta, fingerprint
from training.logs import RunLog
from training.optim import milestone_shares, sgd_groups
from training.pretrained import LabelledSets, Pretrained, PretrainedConfig, labelled_sets, load_pretrained
from training.run import Run, due, prepare
from training.step import TrainStep

BEST = "best.pt"
"""The checkpoint with the best accuracy on the test set."""

# ======================================================================================================
# Config
# ======================================================================================================


@dataclass(frozen=True)
class SupervisedConfig(PretrainedConfig):
    """Train a classifier on a pretrained encoder."""

    epochs: int = 100
    """Passes over the training set."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 256
    """Images in a step over all processes."""
    schedule: tuple[int, ...] = ()
    """Epochs at which the rate drops to a tenth; by default 60 % and 80 % of the run."""
    cos: bool = False
    """Cosine schedule in place of the drops."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 0.0
    """L2 penalty on all trained weights."""
    sgd_momentum: Annotated[float, tyro.conf.arg(aliases=["--momentum"])] = 0.9
    """Momentum of SGD."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, if there is one."""
    val_every_epochs: int = 1
    """Epochs between measurements on the test set; the last epoch is always measured."""
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
        return milestone_shares(self.schedule, self.epochs)

    def describe(self, encoder: BackboneMeta, sets: LabelledSets) -> BackboneMeta:  # noqa: ARG002
        """The meta of the encoder after this run; unchanged here, as for a frozen encoder."""
        return encoder

    def as_json(self) -> dict[str, Any]:
        """The options that decide the run's numbers, as JSON values; a resumed run must have the same."""
        files = {"data", "val", "pretrained", "out"}
        may_change = files | {"resume", "device", "num_threads", "val_every_epochs", "log_every_s"}
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {key: value for key, value in plain.items() if key not in may_change}


# ======================================================================================================
# Run
# ======================================================================================================


@dataclass(frozen=True)
class Measured:
    """Accuracy on the test set so far."""

    epoch: int = 0
    """Epochs before the newest measurement; 0 before the first."""
    accuracy: Accuracy | None = None
    """The newest measurement; None before the first."""
    best_top1: float = -1.0
    """Best of all measurements; negative before the first."""

    @classmethod
    def from_json(cls, text: str) -> "Measured":
        """The inverse of ``json.dumps(dataclasses.asdict(…))``."""
        content = json.loads(text)
        accuracy = Accuracy(**content["accuracy"]) if content["accuracy"] else None
        return cls(content["epoch"], accuracy, content["best_top1"])


@dataclass(kw_only=True)
class SupervisedRun(Run):
    """A supervised training run."""

    config: SupervisedConfig
    loader: ViewLoader
    model: Classifier
    sets: LabelledSets
    pretrained: Pretrained
    measured: Measured = Measured()
    start_s: float = dataclasses.field(default_factory=time.perf_counter)
    """Start of the run on this process's clock, moved back by the time taken before a resume."""
    about = "top1 and top5 are shares of the test set; train_top1 is a share of augmented training views."

    @property
    def seconds(self) -> float:
        """Time taken so far, without interruptions."""
        return time.perf_counter() - self.start_s

    def meta(self) -> dict[str, str]:
        """The encoder's meta, the measurements and the time taken."""
        encoder = self.config.describe(self.pretrained.backbone.meta, self.sets)
        measured = json.dumps(dataclasses.asdict(self.measured))
        return encoder.as_strings() | {"measured": measured, "seconds": str(self.seconds)}

    def restore(self, checkpoint: Path) -> dict[str, str]:
        """As `Run.restore`, with the measurements and the time taken."""
        meta = super().restore(checkpoint)
        self.measured = Measured.from_json(meta["measured"])
        self.start_s -= float(meta["seconds"])
        return meta


def assemble(
    config: SupervisedConfig,
    launch: Launch,
    *,
    frozen: bool,
    base_lrs: tuple[float, float],
    subset: NDArray[np.int64] | None = None,
    sync_bn: bool = False,
) -> SupervisedRun:
    """Build a run that is ready for its first step, or with --resume for the step after its checkpoint.

    Args:
        config: of the run.
        launch: of this process.
        frozen: train the classifier only.
        base_lrs: learning rates of encoder and classifier.
        subset: (n,) sorted positions of the training images to use; None for all.
        sync_bn: take BatchNorm statistics over all processes; needs GPUs.
    """
    if sync_bn and launch.device.type == "cpu":
        raise ValueError("--sync-bn needs GPUs; leave it out on a CPU, where each process has its own BN")
    if config.out.resolve() == config.pretrained.parent.resolve():
        raise ValueError(
            f"--out {config.out} is the folder of --pretrained, which must not change; choose another --out"
        )
    precision, checkpoint = prepare(config, launch)
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
    run = SupervisedRun(
        config=config,
        settings=config.as_json()
        | {"encoder_sha256": fingerprint(pretrained.backbone.state), "test_set": sets.val_fingerprint},
        launch=launch,
        precision=precision,
        sets=sets,
        loader=loader,
        pretrained=pretrained,
        model=model,
        optimizer=sgd_groups(parts[frozen:], config.sgd_momentum, config.weight_decay),
    )
    run.resume(checkpoint)
    return run


# ======================================================================================================
# Loop
# ======================================================================================================


def train(run: SupervisedRun) -> bool:
    """Train to the end, or until a stop is requested; returns whether the end was reached."""
    forward = functools.partial(loss_and_metrics, run.distributed_model())
    step = TrainStep(forward, run.optimizer, run.precision)

    def after_epoch(log: RunLog, stopped: bool) -> None:
        if not stopped:
            measure_if_due(run, log)
        run.save(keep=1)

    return run.train(
        lambda batch: train_step(run, step, batch),
        after_epoch,
        # A run that was stopped at the end of an epoch has not measured it yet.
        before=lambda log: measure_if_due(run, log),
    )


def loss_and_metrics(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropy of a batch, and the metrics of the step."""
    logits_NC: Tensor = model(batch.query)
    loss = F.cross_entropy(logits_NC, batch.label)
    train_top1 = (logits_NC.detach().argmax(1) == batch.label).float().mean()
    return loss, {"loss": loss.detach(), "train_top1": train_top1}


def train_step(run: SupervisedRun, step: TrainStep, batch: Batch) -> dict[str, Tensor | float]:
    """One step of the optimizer; metrics stay on the device."""
    lr = run.update_lr()
    return step(batch) | {"lr": lr}


def measure_if_due(run: SupervisedRun, log: RunLog) -> None:
    """Measure on the test set if due, log the accuracy, and keep the state if it is the best so far."""
    config, former = run.config, run.measured
    if former.epoch == run.epoch or not due(run.epoch, config.val_every_epochs, config.epochs):
        return
    log.busy(f"epoch {run.epoch}  measuring on {run.sets.val}")
    accuracy = measure(run)
    run.measured = Measured(run.epoch, accuracy, max(accuracy.top1, former.best_top1))
    log.event({"kind": "eval", "epoch": run.epoch, **vars(accuracy), "best_top1": run.measured.best_top1})
    if accuracy.top1 > former.best_top1 and run.launch.is_main:
        save_checkpoint(config.out / BEST, run.state())


@torch.no_grad()
def measure(run: SupervisedRun) -> Accuracy:
    """Accuracy on the test set; each process evaluates a part of it."""
    launch = run.launch
    if launch.world_size > 1:
        # Each process has its own BatchNorm statistics, but all must measure the same model.
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
