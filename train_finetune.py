"""Fine-tune a pretrained encoder on all labels, or on 1 % or 10 % of them.

With a tenth of the labels of each class. --seed draws them, and labels.txt in --out lists them:
    python train_finetune.py TRAIN --val VAL --pretrained CKPT --labels 0.1

With the published lists of ImageNet images (one file name per line, such as n01440764_10043.JPEG):
    python train_finetune.py TRAIN --val VAL --pretrained CKPT --labels 10percent.txt

One node of eight GPUs, which share the batch of 256 (more nodes as with train_pretrain.py):
    torchrun --nproc-per-node 8 train_finetune.py …

The defaults are SwAV's for a tenth of the labels (arXiv 2006.09882, its eval_semisup.py): 20 epochs, learning
rates 0.01 for the encoder and 0.2 for the classifier. For 1 %, SwAV uses --lr 0.02 --head-lr 5.

Files in --out: result.json; best.pt and the newest checkpoint, from which --resume continues;
backbone.safetensors of the best epoch; labels.txt; logs.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from pipelines import open_set
from pipelines.sets.subset import balanced_subset, lines_of, listed_subset
from training import cli
from training.cli import console
from training.distributed import Launch, init_launch
from training.export import BackboneMeta, fingerprint, load_backbone, save_backbone
from training.files import write_atomically, write_json
from training.pretrained import LabelledSets
from training.published_flags import from_published
from training.run import print_once
from training.supervised import BEST, SupervisedConfig, SupervisedRun, assemble, train

# ======================================================================================================
# Config
# ======================================================================================================


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Fine-tune an encoder."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--exp-path"])] = Path("runs/finetune")
    """Folder of the run."""
    labels: str = "1"
    """Share of each class's images to train on, in (0, 1], drawn by --seed; or a file with one image name per
    line, such as the published lists of 1 % and 10 % of ImageNet."""
    epochs: int = 20
    """Passes over these images."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--learning-rate"])] = 0.01
    """Learning rate of the encoder."""
    head_lr: float = 0.2
    """Learning rate of the classifier."""
    sync_bn: bool = False
    """Take BatchNorm statistics over all GPUs; by default each GPU has its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr < 0 or self.head_lr < 0:
            raise ValueError(f"lr is {self.lr}, head_lr {self.head_lr}; both must be at least 0")

    def describe(self, encoder: BackboneMeta, sets: LabelledSets) -> BackboneMeta:
        """The encoder's meta, extended by the fine-tuning."""
        train_set = sets.train.name if sets.train.name != "train" else f"{sets.train.parent.name}/train"
        return dataclasses.replace(
            encoder,
            method=f"{encoder.method}, fine-tuned" if encoder.method else "fine-tuned",
            trained_on=", then ".join(filter(None, (encoder.trained_on, f"{train_set} with labels"))),
            recipe=json.dumps(
                {"pretraining": json.loads(encoder.recipe or "{}"), "fine_tuning": self.as_json()}
            ),
        )


# ======================================================================================================
# Main
# ======================================================================================================


def main(config: FinetuneConfig) -> None:
    """Fine-tune; see the top of this file."""
    with init_launch(config.device) as launch:
        subset, names = choose_images(config, launch)
        run = assemble(
            config,
            launch,
            frozen=False,
            base_lrs=(config.lr, config.head_lr),
            subset=subset,
            sync_bn=config.sync_bn,
        )
        if names and launch.is_main:
            lines = [os.fsencode(name) + b"\n" for name in names]
            write_atomically(config.out / "labels.txt", lambda file: file.writelines(lines))
        print_once(
            launch,
            f"{run.loader.count:,} labelled images, {config.epochs} epochs of {len(run.loader)} steps",
        )
        if train(run) and launch.is_main:
            finish(run)


def choose_images(config: FinetuneConfig, launch: Launch) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Choose the images to train on.

    Returns:
        The sorted positions of the images and their names. In a set without names, "#17" stands for the name
        of image 17. For all images: None and no names.
    """
    path, _ = config.sets()
    images = open_set(path)
    try:
        share = float(config.labels)
    except ValueError:
        listed = Path(config.labels)
        if not listed.is_file():
            raise FileNotFoundError(
                f"--labels {config.labels} is neither a share in (0, 1] nor a file of image names"
            ) from None
        subset = listed_subset(images.names, images.count, listed)
    else:
        if share == 1:
            return None, []
        subset = balanced_subset(images.labels(np.arange(images.count)), share, config.seed)
    lines = lines_of(images.names, subset)
    if lines is None:
        print_once(launch, f"{path} has no image names; labels.txt holds positions instead")
        lines = [f"#{position}" for position in subset]
    return subset, lines


def finish(run: SupervisedRun) -> None:
    """Write the encoder of the best epoch and the figures, and print them."""
    config, last, best_top1 = run.config, run.measured.accuracy, run.measured.best_top1
    assert last is not None, "the last epoch is always measured"
    best = load_backbone(config.out / BEST)
    run.model.encoder.load_state_dict(best.state)
    backbone, path = config.out / "backbone.safetensors", config.out / "result.json"
    save_backbone(backbone, run.model.encoder, best.meta)
    result = {
        "pretrained": str(config.pretrained),
        "encoder_sha256": fingerprint(run.pretrained.backbone.state),
        "exported_sha256": fingerprint(best.state),
        "labelled_pictures": run.loader.count,
        "top1": last.top1,
        "top5": last.top5,
        "best_top1": best_top1,
        "epochs": config.epochs,
        "seconds": round(run.seconds, 1),
    }
    write_json(path, result)
    console.print(
        f"{config.pretrained}, fine-tuned: top1 {100 * last.top1:.2f} %  best {100 * best_top1:.2f} %  "
        f"({run.seconds:.1f} s, {path}; the best epoch is in {backbone} and {BEST})"
    )


def parse(argv: list[str]) -> FinetuneConfig:
    """The config of a command line."""
    return cli.parse_args(FinetuneConfig, from_published(argv), __doc__)


if __name__ == "__main__":
    cli.program(FinetuneConfig, main, parse=parse)
