"""Pretrain a ConvNet with MoCo and masked mixing (MixMask, Un-Mix, both, erase, or none).

One GPU, or a CPU:
    python train_pretrain.py data/in1k-train.beton --out runs/mixmask --val data/in1k-val.beton

One node of eight GPUs, which share the batch of 256:
    torchrun --nproc-per-node 8 train_pretrain.py data/in1k-train.beton --out runs/mixmask

Two nodes (the same command on both; --out on a shared file system, HEAD the address of the first node):
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 \\
        train_pretrain.py data/in1k-train.beton --out runs/mixmask

Cost and result: the defaults are the published run, ResNet-50 and 200 epochs of ImageNet-1K, with a linear
top-1 of 69.2. `--preset fashion` takes minutes on two CPU cores. This program also accepts the flags of the
published ones, except those of their launcher (docs/command-line.md). The loss rises at first, while real
keys replace the queue's initial noise.

Files in --out: checkpoints for --resume, metrics.jsonl and TensorBoard logs; at the end backbone.safetensors
and checkpoint.pth.tar in the published layout (module.encoder_q.*). On SIGTERM or Ctrl-C the run finishes its
step, writes a checkpoint and prints the command that resumes it.
"""

import dataclasses
import functools
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
from pipelines.kernels.compiled import kernels_are_cached
from pipelines.recipe import evaluation
from presets import PRESETS, PretrainConfig, training_set
from training import cli
from training.distributed import Launch, init_launch
from training.evaluate import Features, effective_rank, extract_features, knn_top1, queue_health
from training.export import BackboneMeta, save_backbone, save_published
from training.logs import RunLog
from training.optim import sgd
from training.precision import Precision
from training.published_flags import from_published
from training.run import Run, due, prepare, print_once
from training.step import TrainStep, check_graph

# ======================================================================================================
# Config
# ======================================================================================================


def parse(argv: list[str]) -> PretrainConfig:
    """The config of a command line: the values of a preset, overridden by the given flags."""
    argv = from_published(argv)
    preset = cli.value_of(argv, "--preset", PretrainConfig.preset)
    # The parser reports an unknown name.
    defaults = PRESETS[preset if preset in PRESETS else PretrainConfig.preset](tyro.MISSING)
    config = cli.parse_args(PretrainConfig, argv, __doc__, defaults)
    return dataclasses.replace(config, data=training_set(config.data))


# ======================================================================================================
# Main
# ======================================================================================================


@dataclass(kw_only=True)
class PretrainRun(Run):
    """A pretraining."""

    config: PretrainConfig
    loader: ViewLoader
    model: MoCo
    about = (
        "The loss rises at first, while real keys replace the initial noise in the queue (queue_filled), "
        "because noise is an easy negative. knn_top1 and rankme rise as the encoder learns. feature_std is "
        "near 1 for features that are spread evenly and 0 for collapsed ones."
    )

    def backbone_meta(self) -> BackboneMeta:
        """The description of the finished backbone for its file."""
        return self.config.backbone_meta(self.model.feature_dim, self.loader.count)

    def meta(self) -> dict[str, str]:
        """The description of the model for a checkpoint."""
        return self.backbone_meta().as_strings()


def main(config: PretrainConfig) -> None:
    """Pretrain; see the top of this file."""
    with init_launch(config.device) as launch:
        run = assemble(config, launch)
        announce(run)
        if train(run):
            export(run)


def assemble(config: PretrainConfig, launch: Launch) -> PretrainRun:
    """Build a run that is ready for its first step, or with --resume for the step after its checkpoint."""
    # ---------------------------------------------------------------------------------------- set-up
    precision, checkpoint = prepare(config, launch)

    # ------------------------------------------------------------------------------------------ data
    loader = open_data(config, launch, precision)

    # ----------------------------------------------------------------------------------------- model
    model = build_model(config, launch.world_size).to(launch.device)
    model.to(memory_format=torch.channels_last)
    optimizer = sgd(model.encoder_q, config.lr, config.sgd_momentum, config.weight_decay)
    if config.cuda_graph:
        check_graph(precision, launch.world_size)
    if config.compile:  # in place, so that the state dict keeps its names
        model.compile_for_training()

    # ---------------------------------------------------------------------------------------- resume
    run = PretrainRun(
        config=config,
        settings=config.as_json(),
        launch=launch,
        precision=precision,
        loader=loader,
        model=model,
        optimizer=optimizer,
    )
    run.resume(checkpoint)
    return run


# ------------------------------------------------------------------------------------------------ loop


def train(run: PretrainRun) -> bool:
    """Train to the end, or until a stop is requested; returns whether the end was reached."""
    config = run.config
    batch_tensors = tensors_of if config.cuda_graph else None
    step = TrainStep(run.distributed_model(), run.optimizer, run.precision, tensors_of=batch_tensors)

    def after_epoch(log: RunLog, stopped: bool) -> None:
        if stopped or due(run.epoch, config.save_every_epochs, config.epochs):
            run.save(config.keep_checkpoints)
        if not stopped and due(run.epoch, config.knn_every_epochs, config.epochs):
            evaluate(run, log)

    return run.train(lambda batch: train_step(run, step, batch), after_epoch)


def train_step(run: PretrainRun, step: TrainStep, batch: Batch) -> dict[str, Tensor | float]:
    """One step of the optimizer; metrics stay on the device."""
    config, lr = run.config, run.update_lr()
    views = 2 if config.mixing.symmetric else 1
    return step(batch) | {"lr": lr} | queue_health(run.step + 1, views * config.batch_size, config.moco_k)


# ======================================================================================================
# Parts
# ======================================================================================================


def open_data(config: PretrainConfig, launch: Launch, precision: Precision) -> ViewLoader:
    """Open this process's share of the set, and check that --val can be used for kNN."""
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
    """Build the model of a config; torch's default generator initialises it."""
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


def evaluate(run: PretrainRun, log: RunLog) -> None:
    """Log the effective rank of the query encoder's features, and with --val their kNN top-1."""
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


def export(run: PretrainRun) -> None:
    """Write the finished backbone and the checkpoint in the published layout; print the next command."""
    config, launch, model = run.config, run.launch, run.model
    if not launch.is_main:
        return
    backbone = config.out / "backbone.safetensors"
    save_backbone(backbone, model.encoder_q, run.backbone_meta())
    save_published(
        config.out / "checkpoint.pth.tar",
        epoch=config.epochs,
        arch=config.arch,
        model=model.state_dict(),
        optimizer=run.optimizer.state_dict(),
    )
    print_once(launch, f"finished: {backbone} (and checkpoint.pth.tar in the published layout)")
    print_once(launch, f"next: python train_lincls.py {config.data} --val VAL --pretrained {backbone}")
    if run.loader.faults:
        num_faults = len(run.loader.faults)
        print_once(launch, f"{num_faults} images could not be decoded and were replaced, see above")


def announce(run: PretrainRun) -> None:
    """Print a summary of the run and what to expect."""
    config, launch, loader = run.config, run.launch, run.loader
    millions = sum(p.numel() for p in run.model.encoder_q.parameters()) / 1e6
    print_once(
        launch,
        f"{config.mixing.method}{', symmetric' if config.mixing.symmetric else ''} on {config.data}: "
        f"{loader.set.count} images by {loader.decoder.name}, {config.arch} of {millions:.1f} M "
        f"parameters, {config.epochs} epochs of {len(loader)} steps, "
        f"{run.precision.name} on {launch.device} × {launch.world_size}, "
        f"{config.describe_batchnorm(launch.world_size)}",
    )
    if config.backend == "auto":
        print_once(launch, loader.chosen)
    if not kernels_are_cached():
        print_once(
            launch, "compiling the loader's inner loops, once after each update; this takes fifteen seconds"
        )
    if not run.step and config.epochs:
        print_once(launch, "the loss rises at first, until real keys have replaced the queue's initial noise")


if __name__ == "__main__":
    cli.program(PretrainConfig, main, parse=parse)
