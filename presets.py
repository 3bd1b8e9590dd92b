"""What a pretraining run is made of, and the named runs.

Every preset is a function that returns a config; its docstring says what it reproduces, what it costs and
what comes out. ``--preset NAME`` starts from one, flags given beside it override.

Costs that are called estimates have not been measured here: they count an encoder's operations, seven passes
a picture with one mixture, and divide by the 21 TFLOP/s that eight GPU-days for the published run stand for.
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
    """What views look like, beyond what MoCo v1 or v2 fixes."""

    crop_px: int = Recipe.crop_px
    """Side of a view."""
    crop_min: float = Recipe.crop_scale[0]
    """Smallest share of the picture's area that a crop takes."""
    blur: bool = True
    """Gaussian blur in the MoCo v2 recipe; CIFAR-sized pictures do without."""
    eval_center_share: float = Recipe.center_share
    """Side of the evaluation's centre crop over the picture's short side; 1 for tiny pictures."""
    mean: tuple[float, float, float] = Recipe.mean
    """Subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = Recipe.std
    """Divides after the mean is subtracted."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an encoder with MoCo and masked mixing. The defaults are the published MixMask run."""

    data: tyro.conf.Positional[Path]
    """A compiled set (.beton file, or folder of shards), or a folder of pictures; of a folder that holds
    train/ and val/, train/ is taken."""
    preset: PresetName = "in1k"
    """The named run to start from; other flags override its values. Their recipes and costs: presets.py."""
    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = Path("runs/pretrain")
    """Folder of the run: checkpoints, logs, the finished backbone."""
    val: Path | None = None
    """A labelled set for the online kNN; without it there is none."""
    arch: Annotated[str, tyro.conf.arg(aliases=["-a"])] = "resnet50"
    """Encoder: a torchvision ResNet, or resnet10w16."""
    small_stem: bool = False
    """3 × 3 first convolution and no max-pool, for pictures of 32 … 64 px."""
    mixing: tyro.conf.OmitArgPrefixes[Mixing] = field(default_factory=Mixing)
    """How query views are mixed."""
    views: tyro.conf.OmitArgPrefixes[Views] = field(default_factory=Views)
    """What views look like."""
    aug_plus: bool = True
    """MoCo v2's augmentation; --no-aug-plus is MoCo v1's."""
    mlp: bool = True
    """Two-layer head, as MoCo v2; --no-mlp is MoCo v1's linear one."""
    moco_dim: int = 128
    """Size of the embedding."""
    moco_k: int = 65536
    """Length of the queue of negatives."""
    moco_m: float = 0.999
    """Share of the key encoder that stays at each step."""
    moco_t: float = 0.2
    """Temperature of the contrast; MoCo v1 takes 0.07."""
    bn_splits: int = 0
    """Parts of a process's batch with BatchNorm statistics of their own, as if each were on a GPU of its own:
    on one device this keeps BN from giving the pairs away. 1 is plain BN; 0 makes eight parts over all
    processes, as published, or as many as divide the batch."""
    joint_forward: bool = False
    """Send queries and mixtures through the encoder as one batch with common BatchNorm statistics, which is
    faster on GPUs; each by itself, as published, if not."""
    compile: bool = False
    """Have torch.compile fuse the whole forward pass, with several processes the encoders alone; the first
    steps take minutes, later ones are faster on GPUs."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph after three steps and replay it, so that the host has next to
    nothing to do; one process on a GPU. Goes with --compile."""
    epochs: int = 200
    """Passes over the set."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 256
    """Pictures in a step over all processes; the queue need not be a multiple of it."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 0.03
    """Learning rate of SGD, for the whole batch."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=["--wd"])] = 1e-4
    """L2 penalty on all weights, as published."""
    sgd_momentum: Annotated[float, tyro.conf.arg(aliases=["--momentum"])] = 0.9
    """Momentum of SGD."""
    cos: bool = True
    """Cosine schedule; --no-cos drops the rate to a tenth at each epoch of --schedule."""
    schedule: tuple[int, ...] = ()
    """Epochs of --no-cos, such as 120 160; by default 60 % and 80 % of the run."""
    precision: PrecisionName = "auto"
    """auto: bf16 on GPUs that have it, else fp16; fp32 on CPUs."""
    backend: Backend = "auto"
    """Who decodes: ffcv and dali take compiled sets, folder takes folders of pictures; auto takes the
    CPU cores unless they are too few for the GPU, and says why (docs/backends.md)."""
    num_threads: int = 0
    """Threads that decode; 0 takes every core this process may use."""
    reading: Reading = "auto"
    """map: let the system keep of a .beton file what fits in memory; read: read pictures ahead of their turn,
    for sets larger than memory; stream: go through shards from end to end with a weaker shuffle, for disks
    that are slow to seek; auto: by the sizes, never stream."""
    dali: DALIOptions = field(default_factory=DALIOptions)
    """How the dali backend decodes on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    seed: int = 0
    """Of initialisation, order, views and mixtures."""
    resume: bool = False
    """Continue from the newest checkpoint in the run's folder, if there is one."""
    save_every_epochs: Annotated[int, tyro.conf.arg(aliases=["--checkpoint-freq"])] = 1
    """Epochs between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    knn_every_epochs: int = 10
    """Epochs between evaluations of the features: effective rank, and kNN where there is a --val. The last
    epoch always has one."""
    knn_bank: int = 50_000
    """Training pictures, drawn at random, whose rank is told and among which neighbours are looked for."""
    knn_k: int = 200
    """Neighbours that vote."""
    log_every_s: float = 5.0
    """Seconds between rows of the log."""

    def __post_init__(self) -> None:
        for name in ("save_every_epochs", "keep_checkpoints", "knn_every_epochs", "knn_bank", "knn_k"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("epochs", "bn_splits", "num_threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.batch_size < 1 or self.lr < 0:
            raise ValueError(f"batch_size is {self.batch_size}, lr {self.lr}; take at least 1 and 0")
        if self.schedule and self.cos:
            raise ValueError("schedule has no effect on a cosine; add --no-cos, or leave out --schedule")
        if self.schedule:
            milestone_shares(self.schedule, self.epochs)

    def splits(self, world_size: int) -> int:
        """The number of BatchNorm splits on each of so many processes."""
        if self.bn_splits:
            return self.bn_splits
        batch = self.batch_size // world_size
        return next(parts for parts in range(max(1, 8 // world_size), 0, -1) if batch % parts == 0)

    def batch_statistics(self, world_size: int) -> str:
        """In words, what keeps BatchNorm from giving the pairs away."""
        splits = self.splits(world_size)
        if world_size > 1:
            return f"keys dealt out over {world_size} processes, {splits} BN split(s) on each"
        return f"BN over {splits} splits of the batch" if splits > 1 else "plain BN, which may leak the pairs"

    def as_json(self) -> dict[str, Any]:
        """What decides the run's numbers, as plain data; a resumed run must agree on it."""
        free = {
            *("preset", "data", "val", "out", "resume", "device", "num_threads", "reading", "log_every_s"),
            *("save_every_epochs", "keep_checkpoints", "knn_every_epochs", "knn_bank", "knn_k"),
            "cuda_graph",
        }
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return {key: value for key, value in plain.items() if key not in free}

    def backbone_meta(self, feature_dim: int, num_pictures: int) -> BackboneMeta:
        """What a reader of the finished backbone must know to use it, and to tell what it is."""
        views = self.views
        return BackboneMeta(
            arch=self.arch,
            feature_dim=feature_dim,
            small_stem=self.small_stem,
            method=self.mixing.method,
            trained_on=f"{self.data.name}, {num_pictures:,} pictures",
            recipe=json.dumps(self.as_json()),
            crop_px=views.crop_px,
            eval_center_share=views.eval_center_share,
            mean=views.mean,
            std=views.std,
        )

    def milestones(self) -> tuple[float, ...]:
        """Shares of the run at which --no-cos drops the rate."""
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
    """DATA/train where DATA holds train/ and val/, as the published programs want it; else DATA itself."""
    train = data / "train"
    return train if train.is_dir() and (data / "val").is_dir() else data


def in1k(data: Path) -> PretrainConfig:
    """The published MixMask run: ResNet-50, ImageNet-1K, 200 epochs, batch 256 (arXiv 2210.11456).

    Published linear probe: 69.2 top-1 (MoCo v2: 67.7; --method both: 69.5). About eight A100 GPU-days, not
    yet measured here.
    """
    return PretrainConfig(data)


def in100(data: Path) -> PretrainConfig:
    """The published MixMask run on 100 classes of ImageNet: a smaller encoder, more epochs.

    Encoder and epochs are those usual for this set, ResNet-18 and 400 (solo-learn, arXiv 2108.01775); all
    else is as in `in1k` (arXiv 2210.11456). The combination is our choice, nothing of it is tuned, and there
    is no published figure for it. One A100 for seventeen hours (estimate, not yet measured here).
    """
    return PretrainConfig(data, preset="in100", out=Path("runs/in100"), arch="resnet18", epochs=400)


def cifar10(data: Path) -> PretrainConfig:
    """Un-Mix on MoCo for CIFAR-10: ResNet-18 with the small stem, 1000 epochs, batch 512 (arXiv 2003.05438).

    Queue 4096, momentum 0.99, temperature 0.1, linear head, crops from 8 % of the picture, no blur, eight
    splits of batch statistics. Published kNN top-1 (k = 200, t = 0.1): 91.3, MoCo alone 89.1; with
    --symmetric 92.3 and 90.5. Five hours of one A100 (estimate, not yet measured here).

    The source divides by smaller deviations (0.202, 0.199, 0.201) than this set's own, taken here. The grid
    is for --method mixmask, both and erase: cells of 8 px, our choice.
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
    """Un-Mix on MoCo for CIFAR-100, `cifar10` in all but mean and deviation (arXiv 2003.05438).

    Published kNN top-1 (k = 200, t = 0.1): 67.3, MoCo alone 63.6; with --symmetric 68.8 and 65.5. Five hours
    of one A100 (estimate, not yet measured here). The source normalises both sets with CIFAR-10's numbers.
    """
    base = cifar10(data)
    views = dataclasses.replace(base.views, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    return dataclasses.replace(base, preset="cifar100", out=Path("runs/cifar100"), views=views)


def tiny_imagenet(data: Path) -> PretrainConfig:
    """MixMask on Tiny-ImageNet at 64 px: the recipe of `cifar10` for 200 epochs, with crops from 20 %.

    MixMask (arXiv 2210.11456) and Un-Mix (arXiv 2003.05438) both report on this set, but no code or command
    for it was published: everything in which this differs from `cifar10` is our choice, the grid of 4 × 4
    cells of 16 px included, and there is no published figure for it. Eight hours of one A100 (estimate, not
    yet measured here).
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
    """The demo's run: a 0.3 M parameter ResNet on Fashion-MNIST at 32 px, a few epochs.

    Two and a half minutes on two CPU cores; `make demo` prints what came out. What so short a run needs:
    a queue that real keys fill within a tenth, crops of nearly all of a picture, which its object fills
    (MoCo's kNN after 85 s at lr 0.06, a bank of 5,000: 75.4 with crops from 0.5, 76.7 from 0.7, 78.6 from
    0.85, 79.2 from 0.95), and batch statistics that do not leak (76.7 with four splits, 75.8 with two). A
    mixture's loss adds to the clean one, and with it the gradient: at lr 0.06 and momentum 0.99, which
    MoCo alone bears, two of three runs of --method both collapsed in their first epoch
    (benchmarks/NOTES.md). Blur would leave little of pictures of 28 px.
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
