"""A runner of the race made of lightly's parts, put together as its documentation's MoCo example does.

https://docs.lightly.ai/self-supervised-learning/examples/moco.html
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.race_ours import Batches, Runner, Setting, train
from models.encoders import build_encoder
from pipelines import open_set
from pipelines.decode.pillow import decode_image
from pipelines.recipe import Recipe, moco_v2
from pipelines.workers import usable_cores


class Pictures(Dataset[list[Tensor]]):
    """The pictures of a compiled set, decoded into memory; each item is its views."""

    def __init__(self, pictures_NHW3: NDArray[np.uint8], transform: MoCoV2Transform) -> None:
        self._pictures_NHW3, self._transform = pictures_NHW3, transform

    def __len__(self) -> int:
        return len(self._pictures_NHW3)

    def __getitem__(self, index: int) -> list[Tensor]:
        """Query and key, each (3, S, S) float32."""
        views: list[Tensor] = self._transform(Image.fromarray(self._pictures_NHW3[index]))
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


class LightlyMoCo(nn.Module):
    """Query and key encoders with lightly's head, loss, memory bank and momentum update."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.encoder, feature_dim = build_encoder(setting.arch)
        head = MoCoProjectionHead(feature_dim, feature_dim, setting.dim)
        self.query = nn.Sequential(self.encoder, head)
        self.key = copy.deepcopy(self.query)
        deactivate_requires_grad(self.key)
        self.criterion = NTXentLoss(setting.temperature, (setting.queue_len, setting.dim))
        self._momentum = setting.momentum

    def forward(self, batch: list[Tensor]) -> Tensor:
        """Loss of the query and key views, a scalar; moves the key encoder and the memory bank."""
        query_N3SS, key_N3SS = batch
        update_momentum(self.query, self.key, m=self._momentum)
        loss: Tensor = self.criterion(self.query(query_N3SS), self.key(key_N3SS).detach())
        return loss


def lightly(setting: Setting, data: Path, hands: tuple[int, int], seed: int) -> Runner:
    """lightly's MoCo v2 on the pictures of a compiled set, which must all have the same size.

    hands: processes of its DataLoader, and threads of torch's operators beside them.
    """
    workers, torch_threads = hands
    torch.manual_seed(seed)
    model = LightlyMoCo(setting)

    def batches() -> Batches:
        images = open_set(data)
        decoded = (decode_image(images.fetch(np.array([i]))) for i in range(images.count))
        pictures = [picture for picture in decoded if picture is not None]
        loader = DataLoader(
            Pictures(np.stack(pictures), transform_of(setting.recipe)),
            batch_size=setting.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            # A server without threads forks the workers; this process has threads that a fork would cut off.
            multiprocessing_context="forkserver" if workers else None,
        )
        while True:
            yield from loader

    return Runner(model, model.encoder, batches, model, torch_threads)


def documented_hands() -> tuple[int, int]:
    """What the documentation's example comes to: a process for each core, and torch's default of threads."""
    return usable_cores(0), usable_cores(0)


def documented(setting: Setting) -> Setting:
    """A setting with the views of the documentation's example: MoCoV2Transform as it comes.

    Those are MoCo v2's numbers, normalisation included. The judge's view is the whole picture, as in ours.
    """
    recipe = setting.recipe
    return dataclasses.replace(
        setting,
        recipe=dataclasses.replace(moco_v2(recipe.crop_px), center_share=recipe.center_share),
    )


def try_hands(
    setting: Setting, data: Path, seconds: float, told: Callable[[str], None]
) -> dict[tuple[int, int], float]:
    """Samples/s of lightly with several divisions of the cores, each trained for so many seconds.

    As in the documentation's example, processes and threads take the cores from each other; fewer of either
    may be faster.
    """
    cores = usable_cores(0)
    rates = {}
    for hands in dict.fromkeys([documented_hands(), (cores, 1), (1, 1), (0, cores)]):
        told(f"trying lightly with {hands[0]} workers and {hands[1]} threads")
        stint = train(lightly(setting, data, hands, 0), setting, seconds, lambda _: None)
        rates[hands] = stint.samples / stint.seconds
    return rates
