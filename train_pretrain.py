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
program's name changed. The loss first rises, while the queue's noise gives way to real keys.

Left in --out: checkpoints that --resume continues, metrics.jsonl and TensorBoard logs, and at the end
backbone.safetensors and checkpoint.pth.tar in the published layout (module.encoder_q.*). SIGTERM or Ctrl-C
finishes the step, writes the state and tells the line that resumes.
"""

import dataclasses
import functools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import cli
from engine.checkpoint import (
    TrainState,
    checkpoint_path,
    generator_states,
    latest,
    load_checkpoint,
    prune,
    restore_generators,
    save_checkpoint,
)
from engine.export import save_backbone, save_published
from engine.knn import extract_features, knn_top1
from engine.launch import Launch, check_agreement, init_launch
from engine.logs import RunLog
from engine.precision import Precision
from engine.schedule import lr_at, set_lr
from engine.stop import StopRequest
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, ViewLoader, build_loader, evaluation_batches
from pipelines.compiled import compiled_before
from pipelines.recipe import evaluation
from presets import PRESETS, PretrainConfig

console = Console(highlight=False, soft_wrap=True)

# ======================================================================================================
# Config
# ======================================================================================================


def parse(argv: list[str]) -> PretrainConfig:
    """The config of a command line: a preset's values, overridden by the flags given."""
    preset = cli.value_of(argv, "--preset", PretrainConfig.preset)
    # An unknown name is left for the parser to refuse.
    start = PRESETS[preset if preset in PRESETS else PretrainConfig.preset](tyro.MISSING)
    return tyro.cli(PretrainConfig, default=start, args=argv, description=__doc__)


def config_as_json(config: PretrainConfig) -> dict[str, Any]:
    """What decides the run's numbers, as plain data; a resumed run must agree on all of it."""
    free = {
        *("preset", "data", "val", "out", "resume", "device", "num_threads", "reading", "log_every_s"),
        *("save_every_epochs", "keep_checkpoints", "knn_every_epochs", "knn_bank", "knn_k"),
    }
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {key: value for key, value in plain.items() if key not in free}


# ======================================================================================================
# Main
# ======================================================================================================


def main(config: PretrainConfig) -> None:
    """Pretrain; see the top of this file."""
    with init_launch(config.device) as launch:
        if config.batch_size % launch.world_size:
            raise ValueError(
                f"batch size {config.batch_size} cannot be shared evenly among {launch.world_size} processes"
            )
        run(config, launch)


def run(config: PretrainConfig, launch: Launch) -> None:
    """One process's part of the run."""
    # ---------------------------------------------------------------------------------------- set-up
    torch.manual_seed(config.seed)
    precision = Precision.choose(config.precision, launch.device)
    found = latest(config.out)
    if found and not config.resume:
        raise ValueError(
            f"{config.out} already holds a run; add --resume to continue it, or choose another --out"
        )

    # ------------------------------------------------------------------------------------------ data
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
    )

    if config.val:
        check_labels(config, loader)

    # ----------------------------------------------------------------------------------------- model
    model = build_model(config, launch.world_size).to(launch.device)
    model.to(memory_format=torch.channels_last)
    if config.compile:
        # In place: the state dict keeps its names.
        model.encoder_q.compile()
        model.encoder_k.compile()
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(),
        config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
    )

    # ---------------------------------------------------------------------------------------- resume
    step, epoch = restore(found, config, model, optimizer, precision, loader) if found else (0, 0)
    check_agreement(launch, step)
    forward: nn.Module = model
    if launch.world_size > 1:
        forward = DistributedDataParallel(model, broadcast_buffers=False)
    total_steps = config.epochs * len(loader)
    announce(config, launch, loader, model, precision, step)

    # ------------------------------------------------------------------------------------------ loop
    stop = StopRequest()
    model.train()
    with RunLog(
        config.out, launch.is_main, total_steps=total_steps, first_step=step, every_s=config.log_every_s
    ) as log:
        while epoch < config.epochs:
            loader.set_epoch(epoch)
            for wait_s, batch in with_waiting_time(loader):
                lr = lr_at(step, total_steps, config.lr, kind="cosine" if config.cos else "step")
                set_lr(optimizer, lr)
                with precision.autocast():
                    loss, metrics = forward(batch)
                optimizer.zero_grad(set_to_none=True)
                precision.scaler.scale(loss).backward()
                precision.scaler.step(optimizer)
                precision.scaler.update()
                log.step(step, metrics | {"lr": lr}, epoch=epoch, samples=config.batch_size, wait_s=wait_s)
                step += 1
                if stop.agreed(launch, ask=step % 10 == 0):
                    break
            else:
                epoch += 1
                stop.agreed(launch, ask=True)
            log.flush()
            if stop.requested or due(epoch, config.save_every_epochs, config.epochs):
                save(config, launch, model, optimizer, precision, loader, step, epoch)
            if stop.requested:
                break
            if config.val and launch.is_main and due(epoch, config.knn_every_epochs, config.epochs):
                log.event({"kind": "knn", "epoch": epoch, "top1": online_knn(config, model, precision)})
    if stop.requested:
        line = shlex.join([*sys.orig_argv, *([] if config.resume else ["--resume"])])
        say(launch, f"stopped after step {step} of {total_steps}; continue with\n    {line}")
        return
    export(config, launch, model, optimizer)
    if loader.faults:
        say(launch, f"{len(loader.faults)} pictures could not be decoded and were replaced, see above")


# ======================================================================================================
# Parts
# ======================================================================================================


def check_labels(config: PretrainConfig, loader: ViewLoader) -> None:
    """Refuse sets without labels before the first step, and not at the first kNN."""
    assert config.val is not None
    held_out = build_loader(config.val, evaluation(config.recipe()), batch_size=1, drop_last=False)
    for path, engine in ((config.data, loader.engine), (config.val, held_out.engine)):
        if engine.labels(np.arange(engine.count)).min() < 0:
            raise ValueError(f"{path} has no labels, which the online kNN needs; leave out --val")


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


def with_waiting_time(loader: ViewLoader) -> Iterator[tuple[float, Batch]]:
    """Batches, each with the seconds it was waited for."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield time.perf_counter() - start, batch


def due(epoch: int, every: int, last: int) -> bool:
    """Whether something done every few epochs is due after ``epoch`` of them; always after the last."""
    return epoch > 0 and (epoch % every == 0 or epoch == last)


def restore(
    checkpoint: Path,
    config: PretrainConfig,
    model: MoCo,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    loader: ViewLoader,
) -> tuple[int, int]:
    """Put everything back as `save` wrote it; the steps done, and the epoch the next one belongs to."""
    state = load_checkpoint(checkpoint, config_as_json(config))
    model.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    if state.scaler:
        precision.scaler.load_state_dict(state.scaler)
    loader.load_state_dict(state.loader)
    restore_generators(state.generators)
    return state.step, state.epoch


def online_knn(config: PretrainConfig, model: MoCo, precision: Precision) -> float:
    """Top-1 of the query encoder's features on the held-out set, in [0, 1]."""
    assert config.val is not None
    model.eval()
    view = evaluation(config.recipe())
    batches = functools.partial(
        evaluation_batches,
        recipe=view,
        device=precision.device,
        num_threads=config.num_threads,
        seed=config.seed,
    )
    bank = extract_features(
        model.backbone_features,
        batches(config.data, backend=config.backend, limit=config.knn_bank),
        precision,
    )
    test = extract_features(model.backbone_features, batches(config.val), precision)
    num_classes = int(max(bank[1].max(), test[1].max())) + 1
    top1 = knn_top1(*bank, *test, num_classes=num_classes, k=min(config.knn_k, len(bank[0])))
    model.train()
    return top1


def save(
    config: PretrainConfig,
    launch: Launch,
    model: MoCo,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    loader: ViewLoader,
    step: int,
    epoch: int,
) -> None:
    """Write the state after ``step`` steps, and drop the oldest ones."""
    if not launch.is_main:
        return
    state = TrainState(
        step=step,
        epoch=epoch,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=precision.scaler.state_dict(),
        loader=loader.state_dict(),
        generators=generator_states(),
        config=config_as_json(config),
        meta=backbone_meta(config, model),
    )
    save_checkpoint(checkpoint_path(config.out, step), state)
    prune(config.out, config.keep_checkpoints)


def backbone_meta(config: PretrainConfig, model: MoCo) -> dict[str, str]:
    """What a reader of the finished backbone must know to use it."""
    views = config.views
    facts = {
        "arch": config.arch,
        "feature_dim": model.feature_dim,
        "small_stem": config.small_stem,
        "method": config.mixing.method,
        "crop_px": views.crop_px,
        "eval_center_share": views.eval_center_share,
        "mean": list(views.mean),
        "std": list(views.std),
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def export(config: PretrainConfig, launch: Launch, model: MoCo, optimizer: torch.optim.Optimizer) -> None:
    """Write the finished backbone and the checkpoint in the published layout; tell the next command."""
    if not launch.is_main:
        return
    backbone = config.out / "backbone.safetensors"
    save_backbone(backbone, model.encoder_q, backbone_meta(config, model))
    save_published(
        config.out / "checkpoint.pth.tar",
        epoch=config.epochs,
        arch=config.arch,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    say(launch, f"finished: {backbone} (and checkpoint.pth.tar in the published layout)")
    say(launch, f"next: python train_lincls.py {config.data} --val VAL --pretrained {backbone}")


def announce(
    config: PretrainConfig, launch: Launch, loader: ViewLoader, model: MoCo, precision: Precision, step: int
) -> None:
    """One line of what runs, one of what to expect."""
    millions = sum(p.numel() for p in model.encoder_q.parameters()) / 1e6
    say(
        launch,
        f"{config.mixing.method} on {config.data}: {loader.engine.count} pictures by {loader.engine.name}, "
        f"{config.arch} of {millions:.1f} M parameters, {config.epochs} epochs of {len(loader)} steps, "
        f"{precision.name} on {launch.device} × {launch.world_size}, "
        f"{batch_statistics(config, launch.world_size)}",
    )
    if config.backend == "auto":
        say(launch, loader.chosen)
    if step:
        say(launch, f"continuing after step {step}")
    if not compiled_before():
        say(launch, "the loader's inner loops are compiled now, once after each update: some fifteen seconds")
    if not step and config.epochs:
        say(launch, "the loss rises at first, until the queue's noise has given way to real keys")


def batch_statistics(config: PretrainConfig, world_size: int) -> str:
    """In words, what keeps BatchNorm from giving the pairs away."""
    splits = config.splits(world_size)
    if world_size > 1:
        return f"keys dealt out over {world_size} processes, {splits} BN split(s) on each"
    return f"BN over {splits} splits of the batch" if splits > 1 else "plain BN, which may leak the pairs"


def say(launch: Launch, line: str) -> None:
    """Print a line, once for the whole run."""
    if launch.is_main:
        console.print(line)


if __name__ == "__main__":
    cli.run(lambda: main(parse(sys.argv[1:])))
