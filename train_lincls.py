"""Linear probe and kNN on a frozen encoder.

The published protocol: a linear classifier on random crops, 100 epochs, lr 30. One GPU, or a CPU:
    python train_lincls.py data/in1k-train.beton --val data/in1k-val.beton --pretrained CKPT

One node of eight GPUs (the batch of 256 is shared among them; more nodes as with train_pretrain.py):
    torchrun --nproc-per-node 8 train_lincls.py TRAIN --val VAL --pretrained CKPT

The fast way: features of one centre view cached once, classifiers of many learning rates and weight decays
trained on them in one pass; how far what it gives lies from the published protocol's figure stands in
docs/evaluation.md:
    python train_lincls.py data/in1k-train.beton --val data/in1k-val.beton --pretrained CKPT --cached

kNN alone:
    python train_lincls.py TRAIN --val VAL --pretrained CKPT --knn-only

--pretrained takes our checkpoints and safetensors files, and files in the published layout (.pth.tar with
module.encoder_q.*), all read without running code from them. DATA may also be a folder that holds train/ and
val/. Left in --out: the figures in result.json, those of --cached in cached.json, of --knn-only in knn.json;
of the published protocol also logs, and checkpoints that --resume continues.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from models.classifier import new_classifier
from pipelines import Backend, evaluation_batches
from training import cli, failure
from training.cli import console
from training.distributed import Launch, init_launch
from training.export import fingerprint
from training.features import Features, extract_features, gathered
from training.files import write_json
from training.knn import knn_top1
from training.linear import LinearSetting, accuracies, train_linear
from training.precision import Precision
from training.pretrained import LabelledSets, Pretrained, labelled_sets, load_pretrained
from training.published_flags import from_published
from training.run import say
from training.schedule import MILESTONES
from training.supervised import SupervisedConfig, Training, assemble, fit

# ======================================================================================================
# Config
# ======================================================================================================


_OF_THE_PUBLISHED_PROTOCOL = (
    *("lr", "schedule", "cos", "weight_decay", "sgd_momentum"),
    *("resume", "val_every_epochs", "log_every_s"),
)
_PUBLISHED = ("lr", "cos", "weight_decay", "sgd_momentum", "epochs", "batch_size")
_OF_THE_FAST_WAY = ("cached_lr", "cached_wd")
_OF_TRAINING = ("epochs", "batch_size")


@dataclass(frozen=True)
class ProbeConfig(SupervisedConfig):
    """Measure a frozen encoder. The defaults are the published linear probe."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = Path("runs/lincls")
    """Folder of the run: its figures, and of the published protocol logs and checkpoints."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 30.0
    """Learning rate of SGD."""
    cached: bool = False
    """Train on features of one centre view, computed once, instead of new random crops every epoch."""
    cached_lr: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates that --cached tries."""
    cached_wd: tuple[float, ...] = (0.0, 1e-5, 1e-4)
    """Weight decays that it tries with each of them."""
    knn: bool = True
    """Measure the nearest neighbours, too, for which the training set is seen once in centre views."""
    knn_only: bool = False
    """Measure the nearest neighbours and train no classifier."""
    knn_k: int = 200
    """Neighbours that vote."""
    knn_t: float = 0.1
    """Temperature of their votes."""
    leave_one_out: bool = False
    """Also classify each picture of the training set by its others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knn_k < 1 or not (self.cached_lr and self.cached_wd):
            raise ValueError(
                f"knn_k {self.knn_k}, cached_lr {self.cached_lr}, cached_wd {self.cached_wd}: take at least "
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
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        without: dict[str, str] = {}
        if self.cached or self.knn_only:
            way = "--cached" if self.cached else "--knn-only"
            without |= dict.fromkeys(_OF_THE_PUBLISHED_PROTOCOL, f"with {way}")
        if self.knn_only:
            without |= dict.fromkeys(_OF_TRAINING, "with --knn-only")
        if not self.cached:
            without |= dict.fromkeys(_OF_THE_FAST_WAY, "without --cached")
        if not self.knn:
            without |= dict.fromkeys(("knn_k", "knn_t", "leave_one_out"), "with --no-knn")
        for name, when in without.items():
            if getattr(self, name) != getattr(ProbeConfig, name):
                raise ValueError(f"{name} {getattr(self, name)} has no effect {when}; leave one of them out")

    def as_json(self) -> dict[str, Any]:
        """What decides the weights, without what is measured beside them."""
        measured = ("knn", "leave_one_out", "cached")
        return {name: value for name, value in super().as_json().items() if not name.startswith(measured)}

    def is_published(self) -> bool:
        """Whether the classifier is trained as published."""
        same = all(getattr(self, name) == getattr(ProbeConfig, name) for name in _PUBLISHED)
        return same and self.milestones() == MILESTONES

    def linear_settings(self) -> list[LinearSetting]:
        """What --cached trains classifiers with."""
        return [LinearSetting(lr, wd) for lr in self.cached_lr for wd in self.cached_wd]


# ======================================================================================================
# Main
# ======================================================================================================


def main(config: ProbeConfig) -> None:
    """Probe; see the top of this file."""
    start = time.perf_counter()
    result: dict[str, Any] = {"pretrained": str(config.pretrained)}
    with init_launch(config.device) as launch:
        # ------------------------------------------------------------------------- published protocol
        name = "knn.json" if config.knn_only else "cached.json" if config.cached else "result.json"
        if name == "result.json":
            run = assemble(config, launch, frozen=True, base_lrs=(0.0, config.lr))
            if not fit(run):
                return
            result |= of_random_crops(config, run)
            start = run.start_s
            if launch.is_main:  # what follows may not have room
                write_json(config.out / name, result)
            pretrained, sets = run.pretrained, run.sets
        else:
            pretrained, sets = load_pretrained(config, launch.device), labelled_sets(config)

        # ------------------------------------------------------------------------ on features seen once
        if name != "result.json" or config.knn:
            result |= judge_features(config, launch, pretrained, sets)

        # ---------------------------------------------------------------------------------------- result
        result["seconds"] = round(time.perf_counter() - start, 1)
        if launch.is_main:
            write_json(config.out / name, result)
            told = f"{figures(result)}  ({result['seconds']} s, {config.out / name})"
            say(launch, f"{config.pretrained}: {told}")


def figures(result: Mapping[str, Any]) -> str:
    """The shares of a result, as a line."""
    names = ("knn_top1", "knn_leave_one_out_top1", "linear_top1", "linear_top5")
    return "  ".join(
        f"{name.replace('_', ' ')} {100 * result[name]:.2f} %" for name in names if name in result
    )


# ======================================================================================================
# Parts
# ======================================================================================================


def of_random_crops(config: ProbeConfig, run: Training) -> dict[str, Any]:
    """The figures of a finished run.

    Raises RuntimeError if a weight or a statistic of the frozen encoder is not the file's any more.
    """
    state, accuracy = run.pretrained.backbone.state, run.measured.accuracy
    moved = [
        name
        for name, tensor in run.model.encoder.state_dict().items()
        if not torch.equal(tensor.cpu(), state[name])
    ]
    if moved:
        raise RuntimeError(
            f"{len(moved)} tensors of the frozen encoder have moved, the first are {moved[:3]}"
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


def judge_features(
    config: ProbeConfig, launch: Launch, pretrained: Pretrained, sets: LabelledSets
) -> dict[str, Any]:
    """kNN and, with --cached, classifiers on features of centre views; nothing but on the main process."""
    precision = Precision.choose(config.precision, launch.device)
    bank = cache(config, pretrained, launch, precision, sets.train, config.backend)
    test = cache(config, pretrained, launch, precision, sets.val, "auto")
    if bank is None or test is None:
        return {}
    bank, test = (Features(*(part.to(launch.device) for part in features)) for features in (bank, test))
    result: dict[str, Any] = {"encoder_sha256": fingerprint(pretrained.backbone.state)}
    if config.knn:
        vote = functools.partial(knn_top1, k=config.knn_k, temperature=config.knn_t)
        result |= {"knn_k": min(config.knn_k, len(bank.label_N)), "knn_top1": vote(bank, test)}
        if config.leave_one_out:
            result["knn_leave_one_out_top1"] = vote(bank)
    if config.cached:
        result |= sweep(config, launch, pretrained.feature_dim, sets.num_classes, bank, test)
    return result


def sweep(
    config: ProbeConfig, launch: Launch, feature_dim: int, num_classes: int, bank: Features, test: Features
) -> dict[str, Any]:
    """Classifiers of all settings; the best on the test set, and a table of all."""
    settings = config.linear_settings()
    steps = config.epochs * max(1, len(bank.label_N) // config.batch_size)
    with progress_bar(f"{len(settings)} classifiers", steps, config.batch_size) as advance:
        heads = train_linear(
            bank,
            functools.partial(new_classifier, feature_dim, num_classes),
            settings,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=config.seed,
            device=launch.device,
            advance=advance,
        )
    found = accuracies(heads, test)
    best = max(range(len(found)), key=lambda number: found[number].top1)
    rows = [vars(setting) | vars(accuracy) for setting, accuracy in zip(settings, found, strict=True)]
    table = Table(title="linear top-1, %, by weight decay and learning rate")
    table.add_column("")
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


def cache(
    config: ProbeConfig,
    pretrained: Pretrained,
    launch: Launch,
    precision: Precision,
    path: Path,
    backend: Backend,
) -> Features | None:
    """Features of a set's centre views, gathered in the main process's memory: ImageNet's are 10 GB."""
    batches = evaluation_batches(
        path,
        pretrained.view,
        backend,
        rank=launch.rank,
        world_size=launch.world_size,
        device=precision.device,
        num_threads=config.num_threads,
    )
    pretrained.encoder.eval()
    shown = with_progress(batches, f"features of {path}") if launch.is_main else batches
    return gathered(launch, extract_features(pretrained.encoder, shown, precision, torch.device("cpu")))


def with_progress(batches: Iterable[tuple[Tensor, Tensor]], what: str) -> Iterable[tuple[Tensor, Tensor]]:
    """The same batches, with a line that tells how many pictures have passed, and how fast."""
    start, num = time.perf_counter(), 0
    with console.status(what) as status:
        for images, labels in batches:
            yield images, labels
            num += len(labels)
            status.update(f"{what}: {num:,} ({num / (time.perf_counter() - start):,.0f}/s)")
    console.print(f"{what}: {num:,} ({num / (time.perf_counter() - start):,.0f}/s)")


@contextlib.contextmanager
def progress_bar(what: str, steps: int, batch_size: int) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left; yields what to call after each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    start, done = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=steps)

        def advance() -> None:
            nonlocal done
            done += 1
            rate = done * batch_size / (time.perf_counter() - start)
            progress.update(task, advance=1, description=f"{what} {rate:,.0f}/s")

        yield advance


def parse(argv: list[str]) -> ProbeConfig:
    """The config of a command line, as given or as published."""
    return tyro.cli(
        ProbeConfig,
        args=from_published(argv),
        description=__doc__,
        console_outputs=failure.speaks_for_machine(),
    )


if __name__ == "__main__":
    cli.run(lambda: main(parse(sys.argv[1:])))
