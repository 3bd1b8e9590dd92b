"""MoCo v2 from lightly's parts, put together as in the MoCo example of its documentation.

https://docs.lightly.ai/self-supervised-learning/examples/moco.html

Shape letters: N batch or images, H height, W width, S side of a view.
"""

import copy
import dataclasses
from collections.abc import Generator

import numpy as np
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.encoders import build_encoder
from pipelines import open_set
from pipelines.decode.pillow import decode_image
from pipelines.recipe import Recipe
from pipelines.workers import usable_cores
from presets import PretrainConfig, Views


class Images(Dataset[list[Tensor]]):
    """Images decoded into memory; each item is the two views of one image."""

    def __init__(self, image_NHW3: NDArray[np.uint8], transform: MoCoV2Transform) -> None:
        self._image_NHW3, self._transform = image_NHW3, transform

    def __len__(self) -> int:
        return len(self._image_NHW3)

    def __getitem__(self, index: int) -> list[Tensor]:
        views: list[Tensor] = self._transform(Image.fromarray(self._image_NHW3[index]))
        return views


def transform_of(recipe: Recipe) -> MoCoV2Transform:
    """lightly's MoCo v2 augmentation with the numbers of a recipe."""
    return MoCoV2Transform(
        input_size=recipe.crop_px,
        cj_prob=recipe.jitter_prob,
        cj_bright=recipe.brightness,
        cj_contrast=recipe.contrast,
        cj_sat=recipe.saturation,
        cj_hue=recipe.hue_turns,
        min_scale=recipe.crop_scale[0],
        random_gray_scale=recipe.grey_prob,
        gaussian_blur=recipe.blur_prob,
        sigmas=recipe.blur_sigma_px,
        hf_prob=recipe.flip_prob,
        normalize={"mean": list(recipe.mean), "std": list(recipe.std)},
    )


def documented(preset: PretrainConfig) -> PretrainConfig:
    """The preset with MoCoV2Transform's defaults, which are MoCo v2's; only sizes stay the preset's."""
    sizes = {name: getattr(preset.views, name) for name in ("crop_px", "eval_center_share")}
    return dataclasses.replace(preset, views=Views(**sizes))


def documented_division() -> tuple[int, int]:
    """What the documentation's example amounts to: a worker per core, and torch's default of threads."""
    return usable_cores(0), usable_cores(0)


def in_words(preset: PretrainConfig, workers: int, torch_threads: int) -> str:
    """How lightly is set up."""
    views = "as it comes" if preset == documented(preset) else "with the numbers of our views"
    return (
        f"MoCoV2Transform {views}, MoCoProjectionHead, NTXentLoss with its memory bank, "
        "update_momentum, as in the documentation's example; PIL images made from pixels in memory, a "
        f"DataLoader with {workers} lasting worker(s), {torch_threads} thread(s) in torch, contiguous memory,"
        " BN over the whole batch (the example has no other)"
    )


class LightlyMoCo(nn.Module):
    """Query and key encoders with lightly's head, loss, memory bank and momentum update."""

    def __init__(self, preset: PretrainConfig) -> None:
        super().__init__()
        self.encoder_q, feature_dim = build_encoder(preset.arch)
        head = MoCoProjectionHead(feature_dim, feature_dim, preset.moco_dim)
        self.query = nn.Sequential(self.encoder_q, head)
        self.key = copy.deepcopy(self.query)
        deactivate_requires_grad(self.key)
        self.criterion = NTXentLoss(preset.moco_t, (preset.moco_k, preset.moco_dim))
        self._momentum = preset.moco_m

    def forward(self, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the two views; updates the key encoder and the memory bank."""
        query_N3SS, key_N3SS = batch
        update_momentum(self.query, self.key, m=self._momentum)
        return self.criterion(self.query(query_N3SS), self.key(key_N3SS).detach()), {}


def endless_batches(preset: PretrainConfig, workers: int) -> Generator[list[Tensor], None, None]:
    """Batches of the preset's compiled set, epoch after epoch; all its images must have the same size."""
    images = open_set(preset.data)
    decoded = (decode_image(images.fetch(np.array([i]))) for i in range(images.count))
    image_NHW3 = np.stack([image for image in decoded if image is not None])
    loader = DataLoader(
        Images(image_NHW3, transform_of(preset.recipe())),
        batch_size=preset.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # A server without threads forks the workers; this process has threads that a fork would cut off.
        multiprocessing_context="forkserver" if workers else None,
    )
    while True:
        yield from loader
