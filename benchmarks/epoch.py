"""Whole MixMask epochs on the CPU: ours against the published recipe in plain PyTorch.

Images, architecture, initial weights, optimizer and threads are the same. Ours reads the compiled set and
trains as `train_pretrain` does, but with torch's default SGD and without keeping freed memory, from which
both would gain. The published recipe reads files with PIL and torchvision in the processes of a DataLoader,
which stay alive, mixes in the training process, keeps images in contiguous memory and trains
`benchmarks.published.PlainMoCo`. They take turns by epochs, after a pass over the data with one step.

Hooks on encoders and heads divide the time of an epoch into parts. *data*: waiting for the next batch, mixing
included; loaders also work on other threads, which slows the other parts. *encoder*: forward, backward,
optimizer. *loss*: the rest of a step, with the head and the updates of the key encoder and the queue.
"""

import dataclasses
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.peers.with_torchvision import TwoViews, pil_recipe
from benchmarks.published import PlainMoCo, loss_of, plain_mixmask
from benchmarks.run_options import Bars, median_and_range, print_table
from benchmarks.sample_sets import SampleSet, SampleSets, read_with_pil
from benchmarks.timing import summary
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, build_loader
from pipelines.randomness import Draw
from pipelines.recipe import Mixing, Recipe, moco_v2
from pipelines.workers import usable_cores
from presets import PretrainConfig
from training.cli import console

StepPart = Literal["data", "encoder", "loss"]
PARTS: tuple[StepPart, ...] = get_args(StepPart)
PLAIN, OURS, OURS_ONE_BN = "published, plain", "ours", "ours, BN over the whole batch"
_SGD = {name: getattr(PretrainConfig, name) for name in ("lr", "sgd_momentum", "weight_decay")}
_SEED = 0


@dataclass(frozen=True)
class EpochSetting:
    """What an epoch consists of. The defaults take one to two minutes on two cores."""

    arch: str = "resnet18"
    crop_px: int = 224
    pictures: int = 256  # photographs in the set
    batch_size: int = 64
    epochs: int = 2  # measured ones of each training
    queue_len: int = 65536
    bn_splits: int = 8  # parts of our batch with BatchNorm statistics of their own, as on one device

    def brief(self) -> "EpochSetting":
        """The same for a look: at most 128 images at 96 px, one epoch."""
        pictures, crop_px = min(self.pictures, 128), min(self.crop_px, 96)
        return dataclasses.replace(self, pictures=pictures, crop_px=crop_px, epochs=1)

    @property
    def recipe(self) -> Recipe:
        """Views and mixtures: MoCo v2 with the published MixMask run's masks."""
        return moco_v2(self.crop_px, Mixing(method="mixmask"))


def measure_epochs(settings: list[EpochSetting], data: Path, bars: Bars) -> dict[str, Any]:
    """Time epochs of each setting; the JSON's ``epoch``, with the first setting's as the main figures."""
    # The server that forks the DataLoader's workers imports the module once for all of them.
    multiprocessing.get_context("forkserver").set_forkserver_preload([TwoViews.__module__])
    measured = []
    for setting in settings:
        bars.next_part(f"epochs of {setting.arch} at {setting.crop_px} px")
        images = SampleSets(data, setting.pictures, bars.note).pass_through
        measured.append(_measure(setting, images, bars))
    return {
        "speedup": measured[0]["speedup"],
        "split": {name: row["split"] for name, row in measured[0]["rows"].items()},
        "unit": "s",
        "config": {
            "method": "mixmask",
            **_SGD,
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


class Training:
    """A model, its optimizer and its batches, with a clock on the parts of its steps."""

    def __init__(self, model: MoCo | PlainMoCo, batches: Callable[[int], Iterable[Batch]]) -> None:
        """Hook the clock into the model; ``batches`` returns the batches of an epoch."""
        self.model, self._batches = model.train(), batches
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = PARTS[0], 0.0
        lr, momentum, weight_decay = _SGD.values()
        trained = model.encoder_q.parameters()
        self._optimizer = torch.optim.SGD(trained, lr, momentum, weight_decay=weight_decay)
        for encoder in (model.encoder_q, model.encoder_k):
            head = encoder.get_submodule("fc")
            encoder.register_forward_pre_hook(lambda *_: self._enter("encoder"))
            head.register_forward_pre_hook(lambda *_: self._enter("loss"))
            head.register_full_backward_pre_hook(lambda *_: self._enter("loss"))
            head.register_full_backward_hook(lambda *_: self._enter("encoder"))

    def epoch(self, number: int, max_steps: int, progress: Callable[[], None]) -> float:
        """Go once through the data and train on its first ``max_steps`` batches; the mean loss."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "data", time.perf_counter()
        losses: list[Tensor] = []
        for batch in self._batches(number):
            progress()
            if len(losses) < max_steps:
                losses.append(self.step(batch))
        self._enter("data")
        return torch.stack(losses).mean().item()

    def step(self, batch: Batch) -> Tensor:
        """Train on one batch; its loss."""
        self._enter("loss")
        loss = loss_of(self.model, batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._enter("encoder")
        self._optimizer.step()
        self._enter("data")
        return loss.detach()

    def _enter(self, part: StepPart) -> None:
        """Count time for ``part`` from now on."""
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


def trainings(setting: EpochSetting, images: SampleSet) -> dict[str, Training]:
    """The published recipe, and ours with and without split BN; all start from the same weights."""
    torch.manual_seed(_SEED)
    build = functools.partial(build_encoder, setting.arch)
    models = {
        name: MoCo(build, method="mixmask", queue_len=setting.queue_len, bn_splits=splits)
        for name, splits in ((OURS, setting.bn_splits), (OURS_ONE_BN, 1))
    }
    models[OURS_ONE_BN].load_state_dict(models[OURS].state_dict())
    plain = PlainMoCo(build, method="mixmask", queue_len=setting.queue_len).start_like(models[OURS])
    found = {PLAIN: Training(plain, _plain_batches(setting, images))}
    for name, model in models.items():
        found[name] = Training(model.to(memory_format=torch.channels_last), _our_batches(setting, images))
    return found


def _our_batches(setting: EpochSetting, images: SampleSet) -> Callable[[int], Iterable[Batch]]:
    loader = build_loader(images.beton, setting.recipe, batch_size=setting.batch_size, seed=_SEED)

    def batches(epoch: int) -> Iterable[Batch]:
        loader.set_epoch(epoch)
        return loader

    return batches


def _plain_batches(setting: EpochSetting, images: SampleSet) -> Callable[[int], Iterable[Batch]]:
    views = TwoViews(transforms.Compose(pil_recipe(setting.recipe)))
    loader = DataLoader(
        ImageFolder(str(images.folder), views, loader=read_with_pil),
        setting.batch_size,
        shuffle=True,
        num_workers=usable_cores(0),
        drop_last=True,
        persistent_workers=True,
        # A server without threads forks the workers; this process has threads that a fork would cut off.
        multiprocessing_context="forkserver",
    )

    def batches(epoch: int) -> Iterable[Batch]:
        for step, ((query, key), _) in enumerate(loader):
            draw = Draw(_SEED, epoch, np.array([step]))
            yield plain_mixmask(query, key, setting.recipe.mixing, draw)

    return batches


def _measure(setting: EpochSetting, images: SampleSet, bars: Bars) -> dict[str, Any]:
    """The measured epochs of one setting; epoch 0 is the warm-up."""
    each = trainings(setting, images)
    num_batches = setting.pictures // setting.batch_size
    step = bars.steps((1 + setting.epochs) * len(each) * num_batches)
    epochs: dict[str, list[dict[StepPart, float]]] = {name: [] for name in each}
    losses = {}
    for number in range(1 + setting.epochs):
        for name, training in each.items():
            progress = functools.partial(step, f"{name}, epoch {number}" if number else f"{name}, warming up")
            losses[name] = training.epoch(number, num_batches if number else 1, progress)
            if number:
                epochs[name].append(training.seconds)
    rows, medians = {}, {}
    for name, done in epochs.items():
        split = {part: round(statistics.median(seconds[part] for seconds in done), 3) for part in PARTS}
        totals = [sum(seconds.values()) for seconds in done]
        medians[name] = statistics.median(totals)
        rows[name] = {**summary(totals), "split": split, "loss": round(losses[name], 4)}
    return {
        **dataclasses.asdict(setting),
        "rows": rows,
        "speedup": round(medians[PLAIN] / medians[OURS], 4),
        "speedup_one_bn": round(medians[PLAIN] / medians[OURS_ONE_BN], 4),
    }


def print_epochs(epoch: dict[str, Any]) -> None:
    """A table of each setting."""
    for setting in epoch["settings"]:
        rows = {
            name: {"epoch": median_and_range(row, 2)}
            | {part: f"{row['split'][part]:.2f}" for part in PARTS}
            | {"loss value": f"{row['loss']:.3f}"}
            for name, row in setting["rows"].items()
        }
        print_table(
            f"An epoch of {setting['arch']} at {setting['crop_px']} px, {setting['pictures']} pictures in "
            f"batches of {setting['batch_size']}; s, medians of {setting['epochs']}",
            rows,
        )
        console.print(
            f"ours is {setting['speedup']:.2f} × as fast, {setting['speedup_one_bn']:.2f} × with the same BN"
        )
