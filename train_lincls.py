"""Linear probe and kNN on a frozen encoder, by one of three protocols.

Published: a linear classifier on random crops, 100 epochs, learning rate 30. One GPU, or a CPU:
    python train_lincls.py data/in1k-train.beton --val data/in1k-val.beton --pretrained CKPT

One node of eight GPUs, which share the batch of 256 (more nodes as with train_pretrain.py):
    torchrun --nproc-per-node 8 train_lincls.py TRAIN --val VAL --pretrained CKPT

Cached: compute the features of one centre view once, and train classifiers of many learning rates and weight
decays on them in one pass (docs/evaluation.md compares the two protocols):
    python train_lincls.py data/in1k-train.beton --val data/in1k-val.beton --pretrained CKPT --cached

kNN alone:
    python train_lincls.py TRAIN --val VAL --pretrained CKPT --knn-only

--pretrained takes our checkpoints and safetensors files, and files in the published layout (.pth.tar with
module.encoder_q.*); reading one runs no code from it. DATA may also be a folder that holds train/ and val/.

Files in --out: result.json, cached.json or knn.json, by protocol. The published protocol also writes logs,
and checkpoints for --resume.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table
from torch import Tensor

from models.classifier import new_classifier
from pipelines import Backend, evaluation_batches
from training import cli
from training.cli import console
from training.distributed import Launch, init_launch
from training.evaluate import (
    Features,
    LinearSetting,
    accuracies,
    extract_features,
    gather_features,
    knn_top1,
    train_linear,
)
from training.export import fingerprint
from training.files import write_json
from training.logs import progress
from training.optim import MILESTONES
from training.precision import Precision
from training.pretrained import LabelledSets, Pretrained, labelled_sets, load_pretrained
from training.published_flags import from_published
from training.run import print_once
from training.supervised import SupervisedConfig, SupervisedRun, assemble, train

# ======================================================================================================
# Config
# ======================================================================================================

Protocol = Literal["published", "cached", "knn"]
OUTPUT: dict[Protocol, str] = {"published": "result.json", "cached": "cached.json", "knn": "knn.json"}
"""The file that each protocol writes."""
# Options that have an effect only in the published protocol, with --cached, with kNN, and with a classifier.
_PUBLISHED_ONLY = (
    *("lr", "schedule", "cos", "weight_decay", "sgd_momentum"),
    *("resume", "val_every_epochs", "log_every_s"),
)
_CACHED_ONLY = ("cached_lr", "cached_wd")
_KNN_ONLY = ("knn_k", "knn_t", "leave_one_out")
_CLASSIFIER_ONLY = ("epochs", "batch_size")


@dataclass(frozen=True)
class ProbeConfig(SupervisedConfig):
    """Measure a frozen encoder. The defaults are the published linear probe."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = Path("runs/lincls")
    """Folder of the run: its figures, and the logs and checkpoints of the published protocol."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 30.0
    """Learning rate of SGD."""
    cached: bool = False
    """Train on features of one centre view, computed once, instead of new random crops in each epoch."""
    cached_lr: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates that --cached tries."""
    cached_wd: tuple[float, ...] = (0.0, 1e-5, 1e-4)
    """Weight decays that --cached tries with each learning rate."""
    knn: bool = True
    """Also measure kNN accuracy, which takes one pass over the training set in centre views."""
    knn_only: bool = False
    """Measure kNN accuracy and train no classifier."""
    knn_k: int = 200
    """Neighbours that vote."""
    knn_t: float = 0.1
    """Temperature of the votes."""
    leave_one_out: bool = False
    """Also classify each training image by the other training images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knn_k < 1 or not (self.cached_lr and self.cached_wd):
            raise ValueError(
                f"knn_k {self.knn_k}, cached_lr {self.cached_lr}, cached_wd {self.cached_wd}: give at least "
                "one of each"
            )
        if self.knn_only and not self.knn:
            raise ValueError("--knn-only and --no-knn leave nothing to measure; leave one of them out")
        if min(self.cached_lr) <= 0 or min(self.cached_wd) < 0:
            raise ValueError(
                f"cached_lr {self.cached_lr}, cached_wd {self.cached_wd}: rates must be more than 0, weight "
                "decays at least 0"
            )
        if not self.knn_t > 0:
            raise ValueError(f"knn_t is {self.knn_t}; it must be more than 0")
        if self.cached and self.knn_only:
            raise ValueError("--cached trains classifiers and --knn-only none; leave one of them out")
        self._refuse_options_without_effect()

    def _refuse_options_without_effect(self) -> None:
        reasons: dict[str, str] = {}
        if self.protocol != "published":
            flag = "--cached" if self.protocol == "cached" else "--knn-only"
            reasons |= dict.fromkeys(_PUBLISHED_ONLY, f"with {flag}")
        if self.protocol == "knn":
            reasons |= dict.fromkeys(_CLASSIFIER_ONLY, "with --knn-only")
        if self.protocol != "cached":
            reasons |= dict.fromkeys(_CACHED_ONLY, "without --cached")
        if not self.knn:
            reasons |= dict.fromkeys(_KNN_ONLY, "with --no-knn")
        for name, reason in reasons.items():
            if getattr(self, name) != getattr(ProbeConfig, name):
                raise ValueError(
                    f"{name} {getattr(self, name)} has no effect {reason}; leave one of them out"
                )

    @property
    def protocol(self) -> Protocol:
        """What is measured; decided by --cached and --knn-only."""
        return "knn" if self.knn_only else "cached" if self.cached else "published"

    @property
    def result_path(self) -> Path:
        """The file that the figures are written to."""
        return self.out / OUTPUT[self.protocol]

    def as_json(self) -> dict[str, Any]:
        """The options that decide the classifier's weights, without those of kNN and --cached."""
        measured = ("knn", "leave_one_out", "cached")
        return {name: value for name, value in super().as_json().items() if not name.startswith(measured)}

    def is_published(self) -> bool:
        """Whether the classifier is trained with the published values."""
        names = ("lr", "cos", "weight_decay", "sgd_momentum", "epochs", "batch_size")
        same = all(getattr(self, name) == getattr(ProbeConfig, name) for name in names)
        return same and self.milestones() == MILESTONES

    def linear_settings(self) -> list[LinearSetting]:
        """The settings of the classifiers that --cached trains."""
        return [LinearSetting(lr, wd) for lr in self.cached_lr for wd in self.cached_wd]


# ======================================================================================================
# Main
# ======================================================================================================


def main(config: ProbeConfig) -> None:
    """Measure; see the top of this file."""
    protocols = {"published": published, "cached": cached, "knn": knn}
    with init_launch(config.device) as launch:
        protocols[config.protocol](config, launch)


def published(config: ProbeConfig, launch: Launch) -> None:
    """Train a classifier on random crops; then measure kNN unless --no-knn is given."""
    run = assemble(config, launch, frozen=True, base_lrs=(0.0, config.lr))
    if not train(run):
        return
    result = classifier_figures(config, run)
    if launch.is_main:  # now, because the kNN may run out of memory
        write_json(config.result_path, {"pretrained": str(config.pretrained)} | result)
    if config.knn and (features := cache_sets(config, launch, run.pretrained, run.sets)):
        result |= knn_figures(config, *features)
    finish(config, launch, result, run.seconds)


def cached(config: ProbeConfig, launch: Launch) -> None:
    """Train classifiers of all settings on cached features; also measure kNN unless --no-knn is given."""
    start, result = time.perf_counter(), dict[str, Any]()
    pretrained, sets = load_pretrained(config, launch.device), labelled_sets(config)
    if features := cache_sets(config, launch, pretrained, sets):
        result["encoder_sha256"] = fingerprint(pretrained.backbone.state)
        result |= knn_figures(config, *features) if config.knn else {}
        new_head = functools.partial(new_classifier, pretrained.feature_dim, sets.num_classes)
        result |= sweep(config, launch.device, new_head, *features)
    finish(config, launch, result, time.perf_counter() - start)


def knn(config: ProbeConfig, launch: Launch) -> None:
    """Measure kNN on cached features."""
    start, result = time.perf_counter(), dict[str, Any]()
    pretrained, sets = load_pretrained(config, launch.device), labelled_sets(config)
    if features := cache_sets(config, launch, pretrained, sets):
        result["encoder_sha256"] = fingerprint(pretrained.backbone.state)
        result |= knn_figures(config, *features)
    finish(config, launch, result, time.perf_counter() - start)


def finish(config: ProbeConfig, launch: Launch, result: dict[str, Any], seconds: float) -> None:
    """Write the figures and print the accuracies."""
    if not launch.is_main:
        return
    result = {"pretrained": str(config.pretrained)} | result | {"seconds": round(seconds, 1)}
    write_json(config.result_path, result)
    names = ("knn_top1", "knn_leave_one_out_top1", "linear_top1", "linear_top5")
    shares = (f"{name.replace('_', ' ')} {100 * result[name]:.2f} %" for name in names if name in result)
    line = f"{config.pretrained}: {'  '.join(shares)}  ({result['seconds']} s, {config.result_path})"
    print_once(launch, line)


# ======================================================================================================
# Parts
# ======================================================================================================


def classifier_figures(config: ProbeConfig, run: SupervisedRun) -> dict[str, Any]:
    """The figures of a finished run.

    Raises:
        RuntimeError: if a weight or a BatchNorm statistic of the frozen encoder differs from its file.
    """
    state, accuracy = run.pretrained.backbone.state, run.measured.accuracy
    changed = [
        name
        for name, tensor in run.model.encoder.state_dict().items()
        if not torch.equal(tensor.cpu(), state[name])
    ]
    if changed:
        raise RuntimeError(
            f"{len(changed)} tensors of the frozen encoder have changed, the first are {changed[:3]}"
        )
    assert accuracy is not None, "the last epoch is always measured"
    return {
        "encoder_sha256": fingerprint(state),
        "protocol": "published" if config.is_published() else "random crops",
        "settings": config.as_json(),
        "linear_top1": accuracy.top1,
        "linear_top5": accuracy.top5,
        "linear_best_top1": run.measured.best_top1,
    }


def knn_figures(config: ProbeConfig, bank: Features, test: Features) -> dict[str, Any]:
    """kNN accuracy of the test set, and with --leave-one-out of the training set."""
    top1 = functools.partial(knn_top1, k=config.knn_k, temperature=config.knn_t)
    figures = {"knn_k": min(config.knn_k, len(bank.label_N)), "knn_top1": top1(bank, test)}
    return figures | ({"knn_leave_one_out_top1": top1(bank)} if config.leave_one_out else {})


def sweep(
    config: ProbeConfig,
    device: torch.device,
    new_head: Callable[[], torch.nn.Linear],
    bank: Features,
    test: Features,
) -> dict[str, Any]:
    """Train classifiers of all settings; returns the best on the test set, and all as a table."""
    settings = config.linear_settings()
    steps = config.epochs * max(1, len(bank.label_N) // config.batch_size)
    with progress(console, f"{len(settings)} classifiers", steps * config.batch_size) as advance:
        heads = train_linear(
            bank,
            new_head,
            settings,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            device=device,
            on_step=functools.partial(advance, config.batch_size),
        )
    found = accuracies(heads, test)
    best = max(range(len(found)), key=lambda number: found[number].top1)
    rows = [vars(setting) | vars(accuracy) for setting, accuracy in zip(settings, found, strict=True)]
    table = Table("", title="linear top-1, %, by weight decay and learning rate")
    for lr in config.cached_lr:
        table.add_column(f"{lr:g}", justify="right")
    for wd in config.cached_wd:
        row = (100 * one["top1"] for one in rows if one["weight_decay"] == wd)
        table.add_row(f"{wd:g}", *(f"{share:.2f}" for share in row))
    console.print(table)
    return {
        "protocol": "cached centre view",
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        **{f"linear_{name}": share for name, share in vars(found[best]).items()},
        **{f"linear_{name}": value for name, value in vars(settings[best]).items()},
        "linear_settings": rows,
    }


def cache_sets(
    config: ProbeConfig, launch: Launch, pretrained: Pretrained, sets: LabelledSets
) -> tuple[Features, Features] | None:
    """Features of the training and the test set, on the device; None on other processes than the main one."""
    precision = Precision.choose(config.precision, launch.device)

    def cache(path: Path, backend: Backend) -> Features | None:
        batches = evaluation_batches(
            path,
            pretrained.view,
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            device=precision.device,
            num_threads=config.num_threads,
        )
        shown = with_progress(batches, f"features of {path}") if launch.is_main else batches
        # Gathered on the CPU, because ImageNet's features take 10 GB.
        own = extract_features(pretrained.encoder, shown, precision, torch.device("cpu"))
        return gather_features(launch, own)

    pretrained.encoder.eval()
    bank, test = cache(sets.train, config.backend), cache(sets.val, "auto")
    if bank is None or test is None:
        return None
    bank, test = (Features(*(part.to(launch.device) for part in features)) for features in (bank, test))
    return bank, test


def with_progress(batches: Iterable[tuple[Tensor, Tensor]], what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, with a progress bar."""
    with progress(console, what) as advance:
        for images, labels in batches:
            yield images, labels
            advance(len(labels))


def parse(argv: list[str]) -> ProbeConfig:
    """The config of a command line, ours or the published one."""
    return cli.parse_args(ProbeConfig, from_published(argv), __doc__)


if __name__ == "__main__":
    cli.program(ProbeConfig, main, parse=parse)
