"""The config of a pretraining, and the named runs.

A preset is a function that returns a config; its docstring names its source, its cost and its result.
``--preset NAME`` starts from one, and further flags override its values.

Costs marked as estimates are computed, not measured: the encoder's operations, with seven passes per image
and one mixture, divided by 21 TFLOP/s. At this rate the published run takes eight GPU-days.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipelines import Backend, DALIOptions, Reading
from pipelines.recipe import Mixing, Recipe, moco_v1, moco_v2
from training.export import BackboneMeta
from training.optim import milestone_shares
from training.precision import PrecisionName

PresetName = Literal["in1k", "in100", "tiny-imagenet", "cifar10", "cifar100", "fashion"]


@dataclass(frozen=True)
class Views:
    """Settings of the views that depend on the set, not on the version of MoCo."""

    crop_px: int = Recipe.crop_px
    """Side of a view."""
    crop_min: float = Recipe.crop_scale[0]
    """Smallest share of the image's area that a crop covers."""
    blur: bool = True
    """Gaussian blur in the MoCo v2 recipe; not used for CIFAR-sized images."""
    eval_center_share: float = Recipe.center_share
    """Side of the evaluation's centre crop over the image's short side; 1 for tiny images."""
    mean: tuple[float, float, float] = Recipe.mean
    """Subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = Recipe.std
    """Divisor after the mean is subtracted."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an encoder with MoCo and masked mixing. The defaults are the published MixMask run."""

    data: tyro.conf.Positional[Path]
    """A compiled set (.beton file, or folder of shards), or a folder of images. If a folder holds
    train/ and val/, train/ is used."""
    preset: PresetName = "in1k"
    """The named run to start from; other flags override its values. presets.py has recipes and costs."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = Path("runs/pretrain")
    """Folder of the run: checkpoints, logs and the finished backbone."""
    val: Path | None = None
    """Labelled test set of the online kNN; no kNN without it."""
    arch: Annotated[str, tyro.conf.arg(aliases=["-a"])] = "resnet50"
    """Encoder: a torchvision ResNet, or resnet10w16."""
    small_stem: bool = False
    """3 × 3 first convolution without max-pool, for images of 32 … 64 px."""
    mixing: tyro.conf.OmitArgPrefixes[Mixing] = field(default_factory=Mixing)
    """How query views are mixed."""
    views: tyro.conf.OmitArgPrefixes[Views] = field(default_factory=Views)
    """The size, crops and normalisation of views."""
    aug_plus: bool = True
    """MoCo v2's augmentation; --no-aug-plus is MoCo v1's."""
    mlp: bool = True
    """Two-layer head, as in MoCo v2; --no-mlp is MoCo v1's linear head."""
    moco_dim: int = 128
    """Dimension of the embedding."""
    moco_k: int = 65536
    """Length of the queue of negatives."""
    moco_m: float = 0.999
    """Momentum of the key encoder: the share of its weights that each step keeps."""
    moco_t: float = 0.2
    """Temperature of the contrastive loss; MoCo v1 uses 0.07."""
    bn_splits: int = 0
    """Parts of a process's batch with separate BatchNorm statistics, as if each were on its own GPU. On one
    device this keeps BN statistics from leaking which key matches which query. 1 is plain BN; 0 makes eight
    parts over all processes, as published, or the largest number below that divides the batch."""
    joint_forward: bool = False
    """Encode queries and mixtures as one batch with common BatchNorm statistics, which is faster on GPUs; by
    default one after the other, as published."""
    compile: bool = False
    """Compile the whole forward pass with torch.compile; with several processes, only the encoders. The first
    steps take minutes, later ones are faster on GPUs."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph after three steps and replay it, so that the
    host has almost no work. Needs a single process on a GPU; can be combined with --compile."""
    epochs: int = 200
    """Passes over the set."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 256
    """Images in a step over all processes; the length of the queue need not be a multiple of it."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 0.03
    """Learning rate of SGD for the whole batch; not scaled by its size."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 1e-4
    """L2 penalty on all weights, as published."""
    sgd_momentum: Annotated[float, tyro.conf.arg(aliases=["--momentum"])] = 0.9
    """Momentum of SGD."""
    cos: bool = True
    """Cosine schedule; --no-cos divides the rate by ten at each epoch of --schedule."""
    schedule: tuple[int, ...] = ()
    """Epochs of --no-cos, such as 120 160; by default 60 % and 80 % of the run."""
    precision: PrecisionName = "auto"
    """auto: bf16 on GPUs that have it, fp16 on other GPUs, fp32 on CPUs."""
    backend: Backend = "auto"
    """Decoder: ffcv and dali read compiled sets, folder reads folders of images; auto uses the CPU cores
    unless they are too few for the GPU, and prints the reason (docs/backends.md)."""
    num_threads: int = 0
    """Decoding threads; 0 uses every core that this process may use."""
    reading: Reading = "auto"
    """map: the system caches what fits in memory of a .beton file; read: images are read ahead, for sets
    larger than memory; stream: shards are read sequentially with a weaker shuffle, for disks with slow
    seeks; auto: map or read, by the sizes of set and memory."""
    dali: DALIOptions = field(default_factory=DALIOptions)
    """How the dali backend decodes on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of initialisation, order, views and mixtures."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, if there is one."""
    save_every_epochs: Annotated[int, tyro.conf.arg(aliases=["--checkpoint-freq"])] = 1
    """Epochs between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    knn_every_epochs: int = 10
    """Epochs between evaluations of the features: effective rank, and kNN with --val. The last epoch is
    always evaluated."""
    knn_bank: int = 50_000
    """Random training images for the evaluation: for the effective rank, and as neighbours for kNN."""
    knn_k: int = 200
    """Neighbours that vote."""
    log_every_s: float = 5.0
    """Seconds between rows of the log."""

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("epochs", "lr", "bn_splits", "num_threads"), 0)
        limits |= dict.fromkeys(("batch_size", "save_every_epochs", "keep_checkpoints"), 1)
        limits |= dict.fromkeys(("knn_every_epochs", "knn_bank", "knn_k"), 1)
        for name, limit in limits.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {limit}")
        if self.schedule and self.cos:
            raise ValueError("schedule has no effect on a cosine; add --no-cos, or leave out --schedule")
        if self.schedule:
            milestone_shares(self.schedule, self.epochs)

    def splits(self, world_size: int) -> int:
        """The number of BatchNorm splits on each process."""
        if self.bn_splits:
            return self.bn_splits
        batch = self.batch_size // world_size
        return next(parts for parts in range(max(1, 8 // world_size), 0, -1) if batch % parts == 0)

    def describe_batchnorm(self, world_size: int) -> str:
        """How the run keeps BatchNorm from leaking the pairs, in words."""
        splits = self.splits(world_size)
        if world_size > 1:
            return f"keys shuffled over {world_size} processes, {splits} BN split(s) on each"
        return f"BN over {splits} splits of the batch" if splits > 1 else "plain BN, which may leak the pairs"

    def as_json(self) -> dict[str, Any]:
        """The options that decide the run's numbers, as JSON values; a resumed run must have the same."""
        may_change = {
            *("preset", "data", "val", "out", "resume", "device", "num_threads", "reading", "log_every_s"),
            *("save_every_epochs", "keep_checkpoints", "knn_every_epochs", "knn_bank", "knn_k"),
            "cuda_graph",
        }
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {key: value for key, value in plain.items() if key not in may_change}

    def backbone_meta(self, feature_dim: int, num_images: int) -> BackboneMeta:
        """The description of the finished backbone for its file."""
        views = self.views
        return BackboneMeta(
            arch=self.arch,
            feature_dim=feature_dim,
            small_stem=self.small_stem,
            method=self.mixing.method,
            trained_on=f"{self.data.name}, {num_images:,} pictures",
            recipe=json.dumps(self.as_json()),
            crop_px=views.crop_px,
            eval_center_share=views.eval_center_share,
            mean=views.mean,
            std=views.std,
        )

    def milestones(self) -> tuple[float, ...]:
        """Shares of the run at which the step schedule drops the rate."""
        return milestone_shares(self.schedule, self.epochs)

    def recipe(self) -> Recipe:
        """The loader's recipe for this run."""
        views = self.views
        base = (moco_v2 if self.aug_plus else moco_v1)(views.crop_px, self.mixing)
        return dataclasses.replace(
            base,
            crop_scale=(views.crop_min, 1.0),
            blur_prob=base.blur_prob if views.blur else 0.0,
            center_share=views.eval_center_share,
            mean=views.mean,
            std=views.std,
        )


def training_set(data: Path) -> Path:
    """DATA/train if DATA holds train/ and val/, as the published programs expect; else DATA itself."""
    train = data / "train"
    return train if train.is_dir() and (data / "val").is_dir() else data


def in1k(data: Path) -> PretrainConfig:
    """The published MixMask run: ResNet-50, ImageNet-1K, 200 epochs, batch 256 (arXiv 2210.11456).

    Published linear probe: 69.2 top-1 (MoCo v2: 67.7; --method both: 69.5). Cost: about eight A100 GPU-days,
    not yet measured here.
    """
    return PretrainConfig(data)


def in100(data: Path) -> PretrainConfig:
    """The published MixMask run on 100 classes of ImageNet: a smaller encoder, more epochs.

    Encoder and epochs are the usual ones for this set, ResNet-18 and 400 (solo-learn, arXiv 2108.01775). The
    rest is as in `in1k` (arXiv 2210.11456). The combination is our choice; it is not tuned, and there is no
    published figure for it. Cost: seventeen hours of one A100 (estimate, not yet measured here).
    """
    return PretrainConfig(data, preset="in100", out=Path("runs/in100"), arch="resnet18", epochs=400)


def cifar10(data: Path) -> PretrainConfig:
    """Un-Mix on MoCo for CIFAR-10: ResNet-18 with the small stem, 1000 epochs, batch 512 (arXiv 2003.05438).

    Queue 4096, momentum 0.99, temperature 0.1, linear head, crops from 8 % of the image, no blur, eight BN
    splits. Published kNN top-1 (k = 200, t = 0.1): 91.3, MoCo alone 89.1; with --symmetric 92.3 and 90.5.
    Cost: five hours of one A100 (estimate, not yet measured here).

    The standard deviations are those of the set; the source uses smaller ones (0.202, 0.199, 0.201). The grid
    of 8 px cells for --method mixmask, both and erase is our choice.
    """
    return PretrainConfig(
        data,
        preset="cifar10",
        out=Path("runs/cifar10"),
        arch="resnet18",
        small_stem=True,
        mixing=Mixing(method="unmix", grid_size=4),
        views=Views(
            crop_px=32,
            crop_min=0.08,
            blur=False,
            eval_center_share=1.0,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        mlp=False,
        moco_k=4096,
        moco_m=0.99,
        moco_t=0.1,
        epochs=1000,
        batch_size=512,
        lr=0.06,
        weight_decay=5e-4,
    )


def cifar100(data: Path) -> PretrainConfig:
    """Un-Mix on MoCo for CIFAR-100: `cifar10` with another mean and deviation (arXiv 2003.05438).

    Published kNN top-1 (k = 200, t = 0.1): 67.3, MoCo alone 63.6; with --symmetric 68.8 and 65.5. The source
    normalises both sets with CIFAR-10's numbers. Cost: five hours of one A100 (estimate, not yet measured
    here).
    """
    base = cifar10(data)
    views = dataclasses.replace(base.views, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    return dataclasses.replace(base, preset="cifar100", out=Path("runs/cifar100"), views=views)


def tiny_imagenet(data: Path) -> PretrainConfig:
    """MixMask on Tiny-ImageNet at 64 px: the recipe of `cifar10` for 200 epochs, with crops from 20 %.

    MixMask (arXiv 2210.11456) and Un-Mix (arXiv 2003.05438) report on this set, but published no code or
    command for it. So every difference from `cifar10` is our choice, including the grid of 4 × 4 cells of
    16 px, and there is no published figure for it. Cost: eight hours of one A100 (estimate, not yet measured
    here).
    """
    base = cifar10(data)
    return dataclasses.replace(
        base,
        preset="tiny-imagenet",
        out=Path("runs/tiny-imagenet"),
        mixing=Mixing(grid_size=4),
        views=dataclasses.replace(
            base.views,
            crop_px=64,
            crop_min=0.2,
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2770, 0.2691, 0.2821),
        ),
        epochs=200,
    )


def fashion(data: Path) -> PretrainConfig:
    """The demo: a ResNet of 0.3 M parameters on Fashion-MNIST at 32 px, two epochs.

    Cost: two and a half minutes on two CPU cores. Result: `make demo` prints it. The values are chosen for
    so short a run (benchmarks/NOTES.md):

    - Real keys fill the queue within a tenth of the run.
    - Crops cover most of the image, because the object does. MoCo's kNN after 85 s at lr 0.06 with a bank of
      5,000: 75.4 with crops from 0.5, 76.7 from 0.7, 78.6 from 0.85, 79.2 from 0.95.
    - Four BN splits leak less than two: kNN 76.7 and 75.8.
    - lr 0.03 and momentum 0.996, because the loss of a mixture adds to the gradient: at 0.06 and 0.99, which
      work for MoCo alone, two of three runs of --method both collapsed in their first epoch.
    - No blur, which would leave little of an image of 28 px.
    """
    return PretrainConfig(
        data,
        preset="fashion",
        out=Path("runs/fashion"),
        arch="resnet10w16",
        mixing=Mixing(grid_size=4, mask_per="image"),
        views=Views(
            crop_px=32, crop_min=0.85, blur=False, eval_center_share=1.0, mean=(0.286,) * 3, std=(0.353,) * 3
        ),
        moco_k=4096,
        moco_m=0.996,
        moco_t=0.1,
        bn_splits=4,
        epochs=2,
        batch_size=128,
        lr=0.03,
        weight_decay=5e-4,
        knn_every_epochs=1,
        knn_bank=10_000,
    )


PRESETS: dict[PresetName, Callable[[Path], PretrainConfig]] = {
    "in1k": in1k,
    "in100": in100,
    "tiny-imagenet": tiny_imagenet,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion": fashion,
}
