"""Whole pretraining epochs with MixMask on the CPU: ours beside the published recipe written the plain way.

The same pictures, architecture, initial weights, optimizer and threads. Ours reads the compiled set and
trains as `train_pretrain` does, but with torch's default SGD and without keeping freed memory, which both
would gain from. The published recipe reads the files with PIL and torchvision in the
processes of a DataLoader, mixes in the training process, keeps images in contiguous memory and trains
`benchmarks.published.PlainMoCo`. They take turns by epochs, after a first pass over the data whose first
batch alone is trained on; the DataLoader's processes stay between epochs.

Where the time goes is told by a clock that changes over within the very steps. Backward is done in two
calls, down to the features that enter the heads and on from there, which gives the same gradients. *data*:
waiting for the next batch, mixing included; what loaders do on other threads meanwhile slows the other parts
instead. *encoder*: forward, backward, optimizer. *loss*: everything else of a step, the head and the key
encoder's and the queue's update among it.

Shape letters: N batch, F features.
"""

import dataclasses
import functools
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.peers.with_torchvision import TwoViews, pil_recipe
from benchmarks.published import PlainMoCo, plain_mixmask
from benchmarks.run_options import Bars
from benchmarks.sample_sets import SampleSet, SampleSets, read_with_pil
from benchmarks.timing import summary
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, build_loader
from pipelines.recipe import Mixing, Recipe, moco_v2
from pipelines.workers import usable_cores

Part = Literal["data", "encoder", "loss"]
PLAIN, OURS, OURS_ONE_BN = "published, plain", "ours", "ours, BN over the whole batch"
_LR, _SGD_MOMENTUM, _WEIGHT_DECAY = 0.03, 0.9, 1e-4
_SEED = 0


@dataclass(frozen=True)
class EpochSetting:
    """What an epoch is of. The defaults take one to two minutes on two cores."""

    arch: str = "resnet18"
    """Encoder."""
    crop_px: int = 224
    """Side of the views."""
    pictures: int = 256
    """Photographs in the set."""
    batch_size: int = 64
    """Pictures in a step."""
    epochs: int = 2
    """Epochs of each that count."""
    queue_len: int = 65536
    """Length of the queue."""
    bn_splits: int = 8
    """Parts of the batch with BatchNorm statistics of their own, in ours; a run on one device has eight."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 2 <= self.batch_size <= self.pictures:
            raise ValueError(
                f"{self.epochs} epochs of {self.pictures} pictures in batches of {self.batch_size} measure "
                "nothing; take at least 1 epoch, and batches of 2 … as many as there are pictures"
            )

    def brief(self) -> "EpochSetting":
        """The same for a look: at most 128 pictures at 96 px, one epoch."""
        pictures = max(self.batch_size, min(self.pictures, 128))
        return dataclasses.replace(self, pictures=pictures, crop_px=min(self.crop_px, 96), epochs=1)

    @property
    def recipe(self) -> Recipe:
        """Views and mixtures: MoCo v2 with the published MixMask run's masks."""
        return moco_v2(self.crop_px, Mixing(method="mixmask"))


def measure_epochs(settings: list[EpochSetting], data: Path, bars: Bars) -> dict[str, Any]:
    """Time epochs of each setting; the JSON's ``epoch``, whose first figures are those of the first one."""
    # The server that forks the DataLoader's workers imports once what all of them need.
    multiprocessing.get_context("forkserver").set_forkserver_preload([TwoViews.__module__])
    measured = []
    for setting in settings:
        bars.next_part(f"epochs of {setting.arch} at {setting.crop_px} px")
        pictures = SampleSets(data, setting.pictures, bars.note).pass_through
        measured.append(_measure(setting, pictures, bars))
    return {
        "speedup": measured[0]["speedup"],
        "split": {name: row["split"] for name, row in measured[0]["rows"].items()},
        "unit": "s",
        "config": {
            "method": "mixmask",
            "lr": _LR,
            "sgd_momentum": _SGD_MOMENTUM,
            "weight_decay": _WEIGHT_DECAY,
            "threads": usable_cores(0),
            "precision": "fp32",
            PLAIN: (
                "ImageFolder with PIL, one decode for both views, torchvision transforms in as many "
                "processes of a DataLoader as there are threads; one block mask per batch, drawn and mixed "
                "in the training process; contiguous memory, BN over the whole batch"
            ),
            OURS: "the compiled set, channels_last, BN over bn_splits parts of the batch and keys dealt anew",
            OURS_ONE_BN: "the same with bn_splits 1: the published recipe's BN, which leaks the pairs",
        },
        "settings": measured,
    }


# ------------------------------------------------------------------------------------------------ one epoch


class PartClock:
    """Wall time by part; one part runs at any time."""

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self._part: Part = "data"
        self._since = time.perf_counter()

    def enter(self, part: Part) -> None:
        """From now on time counts for ``part``."""
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


class Training:
    """A model, its optimizer and its batches, with a clock on what they do."""

    def __init__(self, model: MoCo | PlainMoCo, batches: Callable[[int], Iterable[Batch]]) -> None:
        """Put the clock on a model in which nothing was hooked yet; ``batches`` gives those of an epoch."""
        self.model, self.batches = model.train(), batches
        self.clock = PartClock()
        self.optimizer = torch.optim.SGD(
            model.encoder_q.parameters(), _LR, momentum=_SGD_MOMENTUM, weight_decay=_WEIGHT_DECAY
        )
        self._cuts: list[tuple[Tensor, Tensor]] = []
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.register_forward_pre_hook(lambda *_: self.clock.enter("encoder"))
            encoder.get_submodule("fc").register_forward_pre_hook(self._cut)

    def epoch(self, number: int, most_steps: int, progress: Callable[[], None]) -> "Epoch":
        """Go once through the data and train on its first batches, at most so many."""
        self.clock = PartClock()
        losses: list[Tensor] = []
        for batch in self.batches(number):
            progress()
            if len(losses) < most_steps:
                losses.append(self.step(batch))
        self.clock.enter("data")
        return Epoch(self.clock.seconds, torch.stack(losses).mean().item())

    def step(self, batch: Batch) -> Tensor:
        """Train on one batch; its loss."""
        self.clock.enter("loss")
        loss = self.model(batch) if isinstance(self.model, PlainMoCo) else self.model(batch)[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.clock.enter("encoder")
        features, leaves = zip(*self._cuts, strict=True)
        torch.autograd.backward(features, [leaf.grad for leaf in leaves])
        self._cuts.clear()
        self.optimizer.step()
        self.clock.enter("data")
        return loss.detach()  # type: ignore[no-any-return]

    def _cut(self, _head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Give the head features that the encoder's graph does not reach, and note where to go on."""
        self.clock.enter("loss")
        (features_NF,) = inputs
        if not features_NF.requires_grad:
            return inputs
        leaf_NF = features_NF.detach().requires_grad_()
        self._cuts.append((features_NF, leaf_NF))
        return (leaf_NF,)


@dataclass(frozen=True)
class Epoch:
    """What was seen of one."""

    seconds: dict[Part, float]
    """Of each part."""
    loss: float
    """Its mean."""


# ---------------------------------------------------------------------------------------------- both recipes


def trainings(setting: EpochSetting, pictures: SampleSet) -> dict[str, Training]:
    """The published recipe, and ours with and without BN over parts of the batch; all of the same weights."""
    torch.manual_seed(_SEED)
    build = functools.partial(build_encoder, setting.arch)
    ours, ours_one_bn = (
        MoCo(build, method="mixmask", queue_len=setting.queue_len, bn_splits=bn_splits)
        for bn_splits in (setting.bn_splits, 1)
    )
    ours_one_bn.load_state_dict(ours.state_dict())
    plain = PlainMoCo(build, method="mixmask", queue_len=setting.queue_len).start_like(ours)
    found = {PLAIN: Training(plain, _plain_batches(setting, pictures))}
    for name, model in ((OURS, ours), (OURS_ONE_BN, ours_one_bn)):
        found[name] = Training(model.to(memory_format=torch.channels_last), _our_batches(setting, pictures))
    return found


def _our_batches(setting: EpochSetting, pictures: SampleSet) -> Callable[[int], Iterable[Batch]]:
    loader = build_loader(pictures.beton, setting.recipe, batch_size=setting.batch_size, seed=_SEED)

    def batches(epoch: int) -> Iterable[Batch]:
        loader.set_epoch(epoch)
        return loader

    return batches


def _plain_batches(setting: EpochSetting, pictures: SampleSet) -> Callable[[int], Iterator[Batch]]:
    recipe = setting.recipe
    views = TwoViews(transforms.Compose(pil_recipe(recipe)))
    loader = DataLoader(
        ImageFolder(str(pictures.folder), views, loader=read_with_pil),
        setting.batch_size,
        shuffle=True,
        num_workers=usable_cores(0),
        drop_last=True,
        persistent_workers=True,
        # A server without threads forks the workers; this process has threads that a fork would cut off.
        multiprocessing_context="forkserver",
    )

    def batches(epoch: int) -> Iterator[Batch]:
        rng = random.Random(epoch)
        for (query, key), _ in loader:
            yield plain_mixmask(query, key, recipe.mixing, rng)

    return batches


# --------------------------------------------------------------------------------------------- measurement


def _measure(setting: EpochSetting, pictures: SampleSet, bars: Bars) -> dict[str, Any]:
    rivals = trainings(setting, pictures)
    num_batches = setting.pictures // setting.batch_size
    step = bars.steps((1 + setting.epochs) * len(rivals) * num_batches)
    epochs: dict[str, list[Epoch]] = {name: [] for name in rivals}
    for number in range(1 + setting.epochs):
        for name, training in rivals.items():
            told = f"{name}, epoch {number}" if number else f"{name}, warming up"
            seen = training.epoch(number, num_batches if number else 1, functools.partial(step, told))
            if number:
                epochs[name].append(seen)
    medians = {
        name: statistics.median(sum(epoch.seconds.values()) for epoch in seen)
        for name, seen in epochs.items()
    }
    return {
        **dataclasses.asdict(setting),
        "rows": {name: _row(seen) for name, seen in epochs.items()},
        "speedup": round(medians[PLAIN] / medians[OURS], 4),
        "speedup_one_bn": round(medians[PLAIN] / medians[OURS_ONE_BN], 4),
    }


def _row(epochs: list[Epoch]) -> dict[str, Any]:
    """Seconds of an epoch, the median of each part of them, and the last epoch's mean loss."""
    split = {
        part: round(statistics.median(epoch.seconds[part] for epoch in epochs), 3) for part in get_args(Part)
    }
    totals = [sum(epoch.seconds.values()) for epoch in epochs]
    return {**summary(totals), "split": split, "loss": round(epochs[-1].loss, 4)}


def print_epochs(console: Console, epoch: dict[str, Any]) -> None:
    """A table of each setting."""
    for setting in epoch["settings"]:
        table = Table(
            title=f"An epoch of {setting['arch']} at {setting['crop_px']} px, {setting['pictures']} pictures "
            f"in batches of {setting['batch_size']}; s, medians of {setting['epochs']}"
        )
        table.add_column("", no_wrap=True)
        for column in ("epoch", *get_args(Part), "loss value"):
            table.add_column(column, justify="right")
        for name, row in setting["rows"].items():
            parts = [f"{row['split'][part]:.2f}" for part in get_args(Part)]
            total = f"{row['median']:.2f}\n[dim]{row['low']:.2f} … {row['high']:.2f}[/]"
            table.add_row(name, total, *parts, f"{row['loss']:.3f}")
        console.print(table)
        console.print(
            f"ours is {setting['speedup']:.2f} × as fast, {setting['speedup_one_bn']:.2f} × with the same BN"
        )
