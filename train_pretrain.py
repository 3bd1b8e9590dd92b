"""Pretrain a ConvNet with MoCo and masked mixing (MixMask, Un-Mix, both, erase, or none).

One GPU, or a CPU:
    python train_pretrain.py data/in1k-train.beton --out runs/mixmask --val data/in1k-val.beton

One node of eight GPUs (the batch of 256 is shared among them):
    torchrun --nproc-per-node 8 train_pretrain.py data/in1k-train.beton --out runs/mixmask

Two nodes (the same line on both, --out on a file system they share, HEAD the first one's address):
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 \\
        train_pretrain.py data/in1k-train.beton --out runs/mixmask

What it costs and gives: with the defaults, ResNet-50 and 200 epochs of ImageNet-1K as published, 69.2 linear
top-1; `--preset fashion` takes minutes on two CPU cores. The published command line works with only the
program's name and the launcher's flags changed, as docs/command-line.md tells flag by flag. The loss first
rises, while the queue's noise gives way to real keys.

Left in --out: checkpoints that --resume continues, metrics.jsonl and TensorBoard logs, and at the end
backbone.safetensors and checkpoint.pth.tar in the published layout (module.encoder_q.*). SIGTERM or Ctrl-C
finishes the step, writes the state and tells the line that resumes.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from models.batch import tensors_of
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Backend, Batch, ViewLoader, build_loader, evaluation_batches, open_set
from pipelines.kernels.compiled import compiled_before
from pipelines.recipe import evaluation
from presets import PRESETS, PretrainConfig, training_set
from training import cli, failure
from training.checkpoint import checkpoint_path, prune, save_checkpoint, to_resume
from training.distributed import Launch, check_agreement, init_launch
from training.export import BackboneMeta, save_backbone, save_published
from training.features import Features, extract_features
from training.health import effective_rank, queue_health
from training.knn import knn_top1
from training.logs import RunLog
from training.loop import due, train_epochs
from training.optimizer import sgd
from training.precision import Precision
from training.published_flags import from_published
from training.run import how_to_continue, restore, say, shared_among_processes, state_of
from training.schedule import ScheduleKind, lr_at, set_lr
from training.step import TrainStep, check_graph
from training.stop import StopRequest

# ======================================================================================================
# Config
# ======================================================================================================


def parse(argv: list[str]) -> PretrainConfig:
    """The config of a command line: a preset's values, overridden by the flags given."""
    argv = from_published(argv)
    preset = cli.value_of(argv, "--preset", PretrainConfig.preset)
    # An unknown name is left for the parser to refuse.
    start = PRESETS[preset if preset in PRESETS else PretrainConfig.preset](tyro.MISSING)
    config = tyro.cli(
        PretrainConfig,
        default=start,
        args=argv,
        description=__doc__,
        console_outputs=failure.speaks_for_machine(),
    )
    return dataclasses.replace(config, data=training_set(config.data))


CHANGEABLE = ("lr", "precision")
"""What a resumed run may have otherwise, and says so: it is what a loss that is not finite asks for."""


# ======================================================================================================
# Main
# ======================================================================================================


@dataclass
class Run:
    """The parts of a run, and how far it has come."""

    config: PretrainConfig
    launch: Launch
    precision: Precision
    loader: ViewLoader
    model: MoCo
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    epoch: int = 0
    """Epoch the next step belongs to."""

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


def main(config: PretrainConfig) -> None:
    """Pretrain; see the top of this file."""
    with init_launch(config.device) as launch:
        run = assemble(config, launch)
        announce(run)
        with (
            StopRequest() as stop,
            RunLog(
                config.out,
                launch.is_main,
                total_steps=run.total_steps,
                first_step=run.step,
                every_s=config.log_every_s,
            ) as log,
        ):
            train(run, log, stop)
        if stop.requested:
            more = how_to_continue(launch, config.resume)
            say(launch, f"stopped after step {run.step} of {run.total_steps}; {more}")
        else:
            export(run)


def assemble(config: PretrainConfig, launch: Launch) -> Run:
    """A run ready for its next step: the first one, or with --resume the one after the last checkpoint."""
    # ---------------------------------------------------------------------------------------- set-up
    if config.batch_size % launch.world_size:
        raise ValueError(
            f"batch size {config.batch_size} cannot be shared evenly among {launch.world_size} processes"
        )
    found = to_resume(config.out, config.resume)
    torch.manual_seed(config.seed)
    precision = Precision.choose(config.precision, launch.device)

    # ------------------------------------------------------------------------------------------ data
    loader = open_data(config, launch, precision)

    # ----------------------------------------------------------------------------------------- model
    model = build_model(config, launch.world_size).to(launch.device)
    model.to(memory_format=torch.channels_last)
    optimizer = sgd(model.encoder_q, config.lr, config.sgd_momentum, config.weight_decay)
    if config.cuda_graph:
        check_graph(precision, launch.world_size)
    if config.compile:  # in place: the state dict keeps its names
        model.compile_for_training()

    # ---------------------------------------------------------------------------------------- resume
    run = Run(config, launch, precision, loader, model, optimizer)
    if found:
        restore(run, found, config.as_json(), CHANGEABLE)
    check_agreement(launch, run.step)
    return run


# ------------------------------------------------------------------------------------------------ loop


def train(run: Run, log: RunLog, stop: StopRequest) -> None:
    """All epochs that are left, or those until a stop is asked for."""
    config, forward = run.config, shared_among_processes(run)
    step = TrainStep(
        forward, run.optimizer, run.precision, tensors_of=tensors_of if config.cuda_graph else None
    )
    run.model.train()
    for _ in train_epochs(run, functools.partial(train_step, run, step), log, stop):
        if stop.requested or due(run.epoch, config.save_every_epochs, config.epochs):
            save(run)
        if not stop.requested and due(run.epoch, config.knn_every_epochs, config.epochs):
            evaluate(run, log)


def train_step(run: Run, step: TrainStep, batch: Batch) -> dict[str, Tensor | float]:
    """One step of the optimizer; metrics stay on the device."""
    config = run.config
    kind: ScheduleKind = "cosine" if config.cos else "step"
    lr = lr_at(run.step, run.total_steps, config.lr, kind=kind, milestones=config.milestones())
    set_lr(run.optimizer, lr)
    views = 2 if config.mixing.symmetric else 1
    return step(batch) | {"lr": lr} | queue_health(run.step + 1, views * config.batch_size, config.moco_k)


# ======================================================================================================
# Parts
# ======================================================================================================


def open_data(config: PretrainConfig, launch: Launch, precision: Precision) -> ViewLoader:
    """The loader of this process's share; refuses a --val that kNN cannot use before the first step."""
    loader = build_loader(
        config.data,
        config.recipe(),
        config.backend,
        batch_size=config.batch_size // launch.world_size,
        seed=config.seed,
        rank=launch.rank,
        world_size=launch.world_size,
        device=launch.device,
        num_threads=config.num_threads,
        reading=config.reading,
        dali=config.dali,
        dtype=precision.dtype if launch.device.type == "cuda" else torch.float32,
    )
    if config.val:
        for path, images in ((config.data, loader.set), (config.val, open_set(config.val))):
            if images.labels(np.arange(images.count)).min() < 0:
                raise ValueError(f"{path} has no labels, which the online kNN needs; leave out --val")
    return loader


def build_model(config: PretrainConfig, world_size: int) -> MoCo:
    """The model of a config, freshly initialised from torch's default generator."""
    return MoCo(
        functools.partial(build_encoder, config.arch, small_stem=config.small_stem),
        method=config.mixing.method,
        dim=config.moco_dim,
        queue_len=config.moco_k,
        momentum=config.moco_m,
        temperature=config.moco_t,
        mlp=config.mlp,
        bn_splits=config.splits(world_size),
        symmetric=config.mixing.symmetric,
        joint_forward=config.joint_forward,
        queue_seed=config.seed,
    )


def save(run: Run) -> None:
    """Write the state, and drop the oldest ones."""
    if not run.launch.is_main:
        return
    state = state_of(run, run.config.as_json(), backbone_meta(run).as_strings())
    save_checkpoint(checkpoint_path(run.config.out, run.step), state)
    prune(run.config.out, run.config.keep_checkpoints)


def evaluate(run: Run, log: RunLog) -> None:
    """Log the effective rank of the query encoder's features, and with --val the kNN top-1 by them."""
    if not run.launch.is_main:
        return
    config, device = run.config, run.precision.device
    view = evaluation(config.recipe())

    def features(path: Path, backend: Backend, limit: int | None) -> Features:
        log.busy(f"epoch {run.epoch}  features of {path} for the evaluation")
        batches = evaluation_batches(
            path, view, backend, limit=limit, device=device, num_threads=config.num_threads, seed=config.seed
        )
        return extract_features(run.model.backbone_features, batches, run.precision)

    run.model.eval()
    bank = features(config.data, config.backend, config.knn_bank)
    row: dict[str, float | int | str] = {
        "kind": "eval",
        "epoch": run.epoch,
        "rankme": effective_rank(bank.feature_ND),
    }
    if config.val:
        test = features(config.val, "auto", None)
        row["knn_top1"] = knn_top1(bank, test, k=config.knn_k)
    run.model.train()
    log.event(row)


def backbone_meta(run: Run) -> BackboneMeta:
    """What the finished backbone says of itself."""
    return run.config.backbone_meta(run.model.feature_dim, run.loader.count)


def export(run: Run) -> None:
    """Write the finished backbone and the checkpoint in the published layout; tell the next command."""
    config, launch, model = run.config, run.launch, run.model
    if not launch.is_main:
        return
    backbone = config.out / "backbone.safetensors"
    save_backbone(backbone, model.encoder_q, backbone_meta(run))
    save_published(
        config.out / "checkpoint.pth.tar",
        epoch=config.epochs,
        arch=config.arch,
        model=model.state_dict(),
        optimizer=run.optimizer.state_dict(),
    )
    say(launch, f"finished: {backbone} (and checkpoint.pth.tar in the published layout)")
    say(launch, f"next: python train_lincls.py {config.data} --val VAL --pretrained {backbone}")
    if run.loader.faults:
        say(launch, f"{len(run.loader.faults)} pictures could not be decoded and were replaced, see above")


def announce(run: Run) -> None:
    """One line of what runs, one of what to expect."""
    config, launch, loader = run.config, run.launch, run.loader
    millions = sum(p.numel() for p in run.model.encoder_q.parameters()) / 1e6
    say(
        launch,
        f"{config.mixing.method}{', symmetric' if config.mixing.symmetric else ''} on {config.data}: "
        f"{loader.set.count} pictures by {loader.decoder.name}, {config.arch} of {millions:.1f} M "
        f"parameters, {config.epochs} epochs of {len(loader)} steps, "
        f"{run.precision.name} on {launch.device} × {launch.world_size}, "
        f"{config.batch_statistics(launch.world_size)}",
    )
    if config.backend == "auto":
        say(launch, loader.chosen)
    if run.step:
        say(launch, f"continuing after step {run.step}")
    if not compiled_before():
        say(launch, "the loader's inner loops are compiled now, once after each update: some fifteen seconds")
    if not run.step and config.epochs:
        say(launch, "the loss rises at first, until the queue's noise has given way to real keys")


if __name__ == "__main__":
    cli.run(lambda: main(parse(sys.argv[1:])))
