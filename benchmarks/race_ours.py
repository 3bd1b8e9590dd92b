"""What all runners of the race share, and ours: MoCo v2 and MixMask trained as `train_pretrain` trains.

Shape letters: N batch, S side, F features.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.encoders import backbone_features, build_encoder
from models.moco import MoCo
from pipelines import build_loader, evaluation_batches
from pipelines.recipe import Mixing, Recipe, evaluation, moco_v2
from training.evaluate import Features, extract_features, knn_top1
from training.optim import lr_at, scale_lr, sgd
from training.precision import Precision

Batches = Generator[Any, None, None]


def _fashion_recipe() -> Recipe:
    return dataclasses.replace(
        moco_v2(32),
        crop_scale=(0.85, 1.0),
        blur_prob=0.0,
        center_share=1.0,
        mean=(0.286,) * 3,
        std=(0.353,) * 3,
    )


@dataclass(frozen=True)
class Setting:
    """What the runners have in common. All of it is `presets.fashion`, to which a test holds it."""

    arch: str = "resnet10w16"
    """Encoder, of 0.3 M parameters."""
    recipe: Recipe = field(default_factory=_fashion_recipe)
    """What views look like, without a mixture."""
    mixing: Mixing = field(default_factory=lambda: Mixing(grid_size=4, mask_per="image"))
    """How our MixMask mixes."""
    dim: int = 128
    """Size of the embedding."""
    queue_len: int = 4096
    """Length of the queue."""
    momentum: float = 0.996
    """Share of the key encoder that stays at each step."""
    temperature: float = 0.1
    """Of the contrast."""
    bn_splits: int = 4
    """Parts of our batches with BatchNorm statistics of their own."""
    batch_size: int = 128
    """Pictures in a step."""
    lr: float = 0.03
    """Learning rate of SGD at the start; half a cosine over the wall time takes it to 0."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty on all weights."""


FEW = 5000
"""Training pictures among which neighbours are looked for, for the figure that tells encoders apart."""


@dataclass(frozen=True)
class Runner:
    """Somebody in the race, freshly initialised."""

    model: nn.Module
    """Everything; what asks for a gradient is trained."""
    encoder: nn.Module
    """The query encoder in it, whose features are judged."""
    batches: Callable[[], Batches]
    """Batches without end; closing them frees what they hold."""
    loss: Callable[[Any], Tensor]
    """Loss of a batch, a scalar; moves the key encoder and the queue."""
    torch_threads: int
    """Threads of torch's operators while it trains."""


@dataclass(frozen=True)
class Stint:
    """What was seen of a training."""

    samples: int
    seconds: float


# ------------------------------------------------------------------------------------------------- the race


def train(runner: Runner, setting: Setting, seconds: float, progress: Callable[[Stint], None]) -> Stint:
    """Train for so many seconds of wall time, counted from the arrival of the first batch.

    So neither the compiler of our loader nor the start of a DataLoader's processes counts, and all begin with
    batches ahead. ``progress`` is told after each step how far it is.
    """
    optimizer = sgd(runner.model, setting.lr, setting.sgd_momentum, setting.weight_decay)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(runner.torch_threads)
    runner.model.train()
    done = Stint(0, 0.0)
    with closing(runner.batches()) as batches:
        batch = next(batches)
        start = time.perf_counter()
        while done.seconds < seconds:
            scale_lr(optimizer, _lr_after(done.seconds, seconds, 1.0))
            loss = runner.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            batch = next(batches)
            done = Stint(done.samples + setting.batch_size, time.perf_counter() - start)
            progress(done)
    torch.set_num_threads(threads_before)
    return done


def _lr_after(gone_s: float, total_s: float, base_lr: float) -> float:
    """The cosine schedule by wall time, in steps of a millisecond."""
    return lr_at(int(1000 * gone_s), math.ceil(1000 * total_s), base_lr)


def knn(
    encoder: nn.Module, setting: Setting, train_set: Path, test_set: Path, limit: int | None
) -> dict[str, float]:
    """Share of test pictures, in [0, 1], that their 200 nearest training pictures classify (t = 0.1).

    limit: take so many training pictures and a sixth as many test pictures at random, instead of all.
    Returns ``knn``, with the neighbours looked for among `FEW` training pictures only, and ``knn_whole``,
    among all: with so many to choose from a random encoder does well, which leaves less to be seen.
    """
    encoder.eval()
    precision = Precision.choose("fp32", torch.device("cpu"))
    encode = functools.partial(backbone_features, encoder)
    view = evaluation(setting.recipe)
    some = limit and limit // 6
    features, labels = extract_features(encode, evaluation_batches(train_set, view, limit=limit), precision)
    test = extract_features(encode, evaluation_batches(test_set, view, limit=some), precision)
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    few = Features(features[drawn[:FEW]], labels[drawn[:FEW]])
    return {"knn": knn_top1(few, test), "knn_whole": knn_top1(Features(features, labels), test)}


# ------------------------------------------------------------------------------------------------------ ours


def ours(method: Literal["moco", "mixmask"], setting: Setting, data: Path, seed: int) -> Runner:
    """Our MoCo v2, or our MixMask, on a compiled set."""
    torch.manual_seed(seed)
    model = MoCo(
        functools.partial(build_encoder, setting.arch),
        method=method,
        dim=setting.dim,
        queue_len=setting.queue_len,
        momentum=setting.momentum,
        temperature=setting.temperature,
        bn_splits=setting.bn_splits,
        queue_seed=seed,
    ).to(memory_format=torch.channels_last)
    mixing = dataclasses.replace(setting.mixing, method=method)
    recipe = dataclasses.replace(setting.recipe, mixing=mixing)

    def batches() -> Batches:
        loader = build_loader(data, recipe, batch_size=setting.batch_size, seed=seed)
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from loader

    return Runner(
        model=model,
        encoder=model.encoder_q,
        batches=batches,
        loss=lambda batch: model(batch)[0],
        torch_threads=torch.get_num_threads(),
    )
