"""Linear probe and kNN on a frozen encoder.

The published protocol: a linear classifier on random crops, 100 epochs, lr 30 (one GPU, or a CPU):
    python train_lincls.py data/in1k-train.beton --val data/in1k-val.beton --pretrained CKPT

The fast way: features of one centre view cached once, the classifier trained on them in seconds:
    python train_lincls.py data/in1k-train.beton --val data/in1k-val.beton --pretrained CKPT --cached

kNN alone:
    python train_lincls.py TRAIN --val VAL --pretrained CKPT --knn-only

--pretrained takes our checkpoints and safetensors files, and files in the published layout (.pth.tar with
module.encoder_q.*), all read without running code from them. DATA may also be a folder that holds train/ and
val/. Ends with the top-1 figures and result.json in --out.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from engine import cli
from engine.checkpoint import write_atomically
from engine.export import load_backbone
from engine.knn import extract_features, knn_top1
from engine.launch import choose_device
from engine.precision import Precision, PrecisionName
from engine.schedule import lr_at, set_lr
from models.encoders import build_encoder
from pipelines import Backend, build_loader, evaluation_batches
from pipelines.recipe import Recipe, evaluation, linear_train

console = Console(highlight=False, soft_wrap=True)

# ======================================================================================================
# Config
# ======================================================================================================


@dataclass(frozen=True)
class ProbeConfig:
    """Measure a frozen encoder. The defaults are the published linear probe."""

    data: tyro.conf.Positional[Path]
    """Labelled training set: a .beton, a folder of class folders, or a folder that holds train/ and val/."""
    pretrained: Path
    """Checkpoint, backbone.safetensors or published .pth.tar. `train_pretrain.py --epochs 0` exports an
    encoder that has learned nothing, to compare with."""
    val: Path | None = None
    """Labelled test set; by default DATA/val."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = Path("runs/lincls")
    """Folder for result.json."""
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Encoder, where the file does not say; they must agree where it does."""
    small_stem: bool | None = None
    """3 × 3 first convolution and no max-pool, where the file does not say."""
    crop_px: int | None = None
    """Side of a view; by default what the encoder was trained on, else 224."""
    cached: bool = False
    """Train on features of one centre view, computed once, instead of new random crops every epoch."""
    knn_only: bool = False
    """Measure the nearest neighbours and train no classifier."""
    knn_k: int = 200
    """Neighbours that vote."""
    knn_t: float = 0.1
    """Temperature of their votes."""
    epochs: int = 100
    """Passes over the training set; the rate drops to a tenth after 60 % and 80 % of them."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 256
    """Pictures in a step."""
    lr: float = 30.0
    """Learning rate of SGD with momentum 0.9; there is no weight decay."""
    seed: int = 0
    """Of the classifier, the order and the crops."""
    precision: PrecisionName = "auto"
    """Number format of the encoder; the classifier is trained in fp32."""
    backend: Backend = "auto"
    """As in train_pretrain.py."""
    num_threads: int = 0
    """Threads that decode; 0 takes all cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "knn_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Frozen:
    """An encoder in eval mode, and the view it wants."""

    encoder: nn.Module
    feature_dim: int
    view: Recipe


# ======================================================================================================
# Main
# ======================================================================================================


def main(config: ProbeConfig) -> None:
    """Probe; see the top of this file."""
    # ---------------------------------------------------------------------------------------- set-up
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    precision = Precision.choose(config.precision, choose_device(config.device))
    train, val = split_data(config)
    frozen = load_frozen(config, precision.device)

    # -------------------------------------------------------------------------------------- features
    bank = cache(config, frozen, precision, train, "features of the training set")
    test = cache(config, frozen, precision, val, "features of the test set")
    num_classes = check_labels(train, bank[1], val, test[1])
    k = min(config.knn_k, len(bank[0]))
    result: dict[str, float | str | int] = {
        "pretrained": str(config.pretrained),
        "knn_k": k,
        "knn_top1": knn_top1(*bank, *test, num_classes=num_classes, k=k, temperature=config.knn_t),
    }

    # ------------------------------------------------------------------------------------ classifier
    if not config.knn_only:
        classifier = nn.Linear(frozen.feature_dim, num_classes).to(precision.device)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        if config.cached:
            train_on_cache(config, classifier, *bank)
        else:
            train_on_crops(config, classifier, frozen, precision, train)
        predicted = classifier.cpu()(test[0]).argmax(1)
        result["linear_top1"] = (predicted == test[1]).float().mean().item()
        result["protocol"] = "cached centre view" if config.cached else "published"

    # ---------------------------------------------------------------------------------------- result
    result["seconds"] = round(time.perf_counter() - start, 1)
    path = config.out / "result.json"
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))
    figures = "  ".join(
        f"{name.replace('_', ' ')} {100 * result[name]:.2f} %"
        for name in ("knn_top1", "linear_top1")
        if name in result
    )
    console.print(f"{config.pretrained}: {figures}  ({result['seconds']} s, {path})")


# ======================================================================================================
# Parts
# ======================================================================================================


def split_data(config: ProbeConfig) -> tuple[Path, Path]:
    """The training and the test set."""
    if config.val is not None:
        return config.data, config.val
    train, val = config.data / "train", config.data / "val"
    if not (train.is_dir() and val.is_dir()):
        raise ValueError(
            f"no test set: give --val, or a folder with train/ and val/ in place of {config.data}"
        )
    return train, val


def load_frozen(config: ProbeConfig, device: torch.device) -> Frozen:
    """The encoder of a file, in eval mode without gradients."""
    state, meta = load_backbone(config.pretrained)
    arch = config.arch or meta.get("arch")
    if arch is None:
        raise ValueError(f"{config.pretrained} does not say its architecture; give --arch")
    if meta.get("arch", arch) != arch:
        raise ValueError(f"{config.pretrained} holds a {meta['arch']}, --arch says {arch}")
    known = {name: json.loads(text) for name, text in meta.items() if name not in ("arch", "method")}
    small_stem = known.get("small_stem", False) if config.small_stem is None else config.small_stem
    encoder, feature_dim = build_encoder(arch, small_stem=small_stem)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{config.pretrained} is no {arch}{' with the small stem' if small_stem else ''}; "
            f"check --arch and --small-stem ({error})"
        ) from error
    encoder.requires_grad_(False).eval()
    view = evaluation(
        Recipe(
            crop_px=config.crop_px or known.get("crop_px", Recipe.crop_px),
            center_share=known.get("eval_center_share", Recipe.center_share),
            mean=tuple(known.get("mean", Recipe.mean)),
            std=tuple(known.get("std", Recipe.std)),
        )
    )
    encoder.to(device)
    encoder.to(memory_format=torch.channels_last)
    return Frozen(encoder, feature_dim, view)


def cache(
    config: ProbeConfig, frozen: Frozen, precision: Precision, path: Path, what: str
) -> tuple[Tensor, Tensor]:
    """(M, D) float32 features and (M,) labels of a set's centre views, in order."""
    batches = evaluation_batches(
        path, frozen.view, config.backend, device=precision.device, num_threads=config.num_threads
    )
    # Kept in main memory: ImageNet's would fill ten gigabytes of a GPU.
    return extract_features(frozen.encoder, with_progress(batches, what), precision, torch.device("cpu"))


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


def check_labels(train: Path, train_label_N: Tensor, val: Path, val_label_M: Tensor) -> int:
    """The number of classes."""
    num_classes = int(train_label_N.max()) + 1
    for path, labels in ((train, train_label_N), (val, val_label_M)):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{path} has labels {low} … {high}, the training set has 0 … {num_classes - 1}; "
                "a probe needs labelled sets of the same classes (−1 means no label)"
            )
    return num_classes


def train_on_cache(config: ProbeConfig, classifier: nn.Linear, feature_ND: Tensor, label_N: Tensor) -> None:
    """SGD over cached features, a new order every epoch."""
    steps = max(1, len(feature_ND) // config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.SGD(classifier.parameters(), config.lr, momentum=0.9)
    with progress_bar("classifier", config.epochs * steps, config.batch_size) as advance:
        for epoch in range(config.epochs):
            set_lr(optimizer, lr_at(epoch, config.epochs, config.lr, kind="step"))
            order = torch.randperm(len(feature_ND), generator=generator)
            for rows in order.split(config.batch_size)[:steps]:
                features, labels = (x[rows].to(classifier.weight.device) for x in (feature_ND, label_N))
                classify(classifier, optimizer, features, labels)
                advance()


def train_on_crops(
    config: ProbeConfig, classifier: nn.Linear, frozen: Frozen, precision: Precision, train: Path
) -> None:
    """The published protocol: new random crops every epoch through the frozen encoder."""
    loader = build_loader(
        train,
        linear_train(frozen.view),
        config.backend,
        batch_size=config.batch_size,
        seed=config.seed,
        device=precision.device,
        num_threads=config.num_threads,
    )
    optimizer = torch.optim.SGD(classifier.parameters(), config.lr, momentum=0.9)
    with progress_bar("linear probe", config.epochs * len(loader), config.batch_size) as advance:
        for epoch in range(config.epochs):
            set_lr(optimizer, lr_at(epoch, config.epochs, config.lr, kind="step"))
            loader.set_epoch(epoch)
            for batch in loader:
                with torch.no_grad(), precision.autocast():
                    features = frozen.encoder(batch.query)
                classify(classifier, optimizer, features.float(), batch.label)
                advance()


def classify(
    classifier: nn.Linear, optimizer: torch.optim.Optimizer, feature_ND: Tensor, label_N: Tensor
) -> None:
    """One step of the classifier."""
    loss = F.cross_entropy(classifier(feature_ND), label_N)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    cli.run(
        functools.partial(
            lambda argv: main(tyro.cli(ProbeConfig, args=argv, description=__doc__)), sys.argv[1:]
        )
    )
