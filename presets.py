"""What a pretraining run is made of, and the named runs.

Every preset is a function that returns a config; its docstring says what it reproduces, what it costs and
what comes out. ``--preset NAME`` starts from one, flags given beside it override.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.precision import PrecisionName
from pipelines import Backend, DALIOptions, Reading
from pipelines.recipe import Mixing, Recipe, moco_v1, moco_v2

PresetName = Literal["in1k", "fashion"]


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
    """A compiled set (.beton), or a folder of pictures."""
    preset: PresetName = "in1k"
    """The named run to start from; other flags override its values."""
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
    """Compile the encoders (torch.compile); the first steps take minutes, later ones are faster on GPUs."""
    epochs: int = 200
    """Passes over the set."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 256
    """Pictures in a step over all processes; the queue need not be a multiple of it."""
    lr: float = 0.03
    """Learning rate of SGD, for the whole batch."""
    weight_decay: float = 1e-4
    """L2 penalty on all weights, as published."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    cos: bool = True
    """Cosine schedule; --no-cos drops the rate to a tenth after 60 % and 80 % of the epochs."""
    precision: PrecisionName = "auto"
    """auto: bf16 on GPUs that have it, else fp16; fp32 on CPUs."""
    backend: Backend = "auto"
    """Who decodes: ffcv and dali take compiled sets, folder takes folders of pictures; auto chooses by the
    set, by what is installed and by the device, and says why."""
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
    save_every_epochs: int = 1
    """Epochs between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    knn_every_epochs: int = 10
    """Epochs between online kNN evaluations; the last epoch always has one, where there is a --val."""
    knn_bank: int = 50_000
    """Training pictures, drawn at random, among which neighbours are looked for."""
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

    def splits(self, world_size: int) -> int:
        """The number of BatchNorm splits on each of so many processes."""
        if self.bn_splits:
            return self.bn_splits
        batch = self.batch_size // world_size
        return next(parts for parts in range(max(1, 8 // world_size), 0, -1) if batch % parts == 0)

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


def in1k(data: Path) -> PretrainConfig:
    """The published MixMask run: ResNet-50, ImageNet-1K, 200 epochs, batch 256 (arXiv 2210.11456).

    Published linear probe: 69.2 top-1 (MoCo v2: 67.7). About eight A100 GPU-days; not yet measured here.
    """
    return PretrainConfig(data)


def fashion(data: Path) -> PretrainConfig:
    """The demo's run: a 0.3 M parameter ResNet on Fashion-MNIST at 32 px, a few epochs.

    Four minutes on two CPU cores; `make demo` prints what came out. What so short a run needs: a queue that
    real keys fill within the first tenth, crops of at least half the picture (MoCo's kNN after two epochs:
    76.1 against 73.7 with 0.2) and batch statistics that do not leak (75.3 with four splits against 73.7 with
    one; two cost less). Blur would leave little of pictures of 28 px.
    """
    return PretrainConfig(
        data,
        preset="fashion",
        out=Path("runs/fashion"),
        arch="resnet10w16",
        mixing=Mixing(grid_size=4, mask_per="image"),
        views=Views(
            crop_px=32, crop_min=0.5, blur=False, eval_center_share=1.0, mean=(0.286,) * 3, std=(0.353,) * 3
        ),
        moco_k=4096,
        moco_m=0.99,
        moco_t=0.1,
        bn_splits=2,
        epochs=2,
        batch_size=128,
        lr=0.06,
        weight_decay=5e-4,
        knn_every_epochs=1,
        knn_bank=10_000,
    )


PRESETS: dict[PresetName, Callable[[Path], PretrainConfig]] = {"in1k": in1k, "fashion": fashion}
