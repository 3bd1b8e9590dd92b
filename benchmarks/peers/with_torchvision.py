"""torchvision in a DataLoader of processes: the published PIL loader, and v2 on uint8 tensors.

Shape letters: N batch, V views, S side in pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import io, transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from benchmarks.peers.contract import TORCHVISION_PIL, TORCHVISION_V2, FixedCrops, Job, Peer, Work
from benchmarks.sample_sets import read_with_pil
from pipelines.augment.draws import blur_radius_px
from pipelines.recipe import Recipe

_BATCHES_PER_WORKER = 2
# One sampling without end: how a loader starts an epoch is not what is measured.
_ENDLESS = 1 << 40


class _PILBlur:
    """MoCo v2's published blur: PIL's Gaussian filter with a standard deviation drawn per picture."""

    def __init__(self, low_px: float, high_px: float) -> None:
        self._low_px, self._high_px = low_px, high_px

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(self._low_px, self._high_px))
        return image.filter(ImageFilter.GaussianBlur(sigma))


class TwoViews:
    """The published loader's: the same transform applied twice to one decoded picture."""

    def __init__(self, transform: Callable[[object], Tensor]) -> None:
        self._transform = transform

    def __call__(self, image: object) -> tuple[Tensor, Tensor]:
        """Query and key view."""
        return self._transform(image), self._transform(image)


def _pil_crop(recipe: Recipe) -> list[object]:
    return [transforms.RandomResizedCrop(recipe.crop_px, recipe.crop_scale, recipe.crop_ratio)]


def pil_recipe(recipe: Recipe) -> list[object]:
    """The whole augmentation of a PIL image, as transforms in their order."""
    jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue_turns)
    return [
        *_pil_crop(recipe),
        transforms.RandomApply([jitter], recipe.jitter_prob),
        transforms.RandomGrayscale(recipe.grey_prob),
        transforms.RandomApply([_PILBlur(*recipe.blur_sigma_px)], recipe.blur_prob),
        transforms.RandomHorizontalFlip(recipe.flip_prob),
        transforms.ToTensor(),
        transforms.Normalize(recipe.mean, recipe.std),
    ]


def v2_crop(recipe: Recipe) -> v2.Transform:
    """The crop of a (3, H, W) uint8 tensor, antialiased."""
    return v2.RandomResizedCrop(recipe.crop_px, recipe.crop_scale, recipe.crop_ratio, antialias=True)


def v2_recipe(recipe: Recipe) -> v2.Transform:
    """The whole augmentation of a (3, H, W) uint8 tensor.

    The crop takes uint8, as v2 advises; what follows was measured a seventh faster on floats.
    """
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue_turns)
    kernel = 2 * blur_radius_px(recipe.blur_sigma_px[1], recipe.crop_px) + 1
    return v2.Compose(
        [
            v2_crop(recipe),
            v2.RandomHorizontalFlip(recipe.flip_prob),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([jitter], recipe.jitter_prob),
            v2.RandomGrayscale(recipe.grey_prob),
            v2.RandomApply([v2.GaussianBlur(kernel, recipe.blur_sigma_px)], recipe.blur_prob),
            v2.Normalize(recipe.mean, recipe.std),
        ]
    )


def decode_file(path: str | Path) -> Tensor:
    """(3, H, W) uint8 by torchvision's own libjpeg-turbo."""
    picture: Tensor = io.decode_jpeg(io.read_file(str(path)), mode=io.ImageReadMode.RGB)
    return picture


def _batches(job: Job, dataset: ImageFolder) -> Iterator[object]:
    loader = DataLoader(
        dataset,
        job.batch_size,
        sampler=RandomSampler(dataset, num_samples=_ENDLESS),
        num_workers=job.num_threads,
        prefetch_factor=_BATCHES_PER_WORKER,
        drop_last=True,
        # A server without threads forks the workers; this process has threads that a fork would cut off.
        multiprocessing_context="forkserver",
    )
    for views, _ in loader:
        yield views


def _open_pil(steps: Callable[[Recipe], list[object]], job: Job) -> Iterator[object]:
    transform = transforms.Compose(steps(job.recipe))
    return _batches(job, ImageFolder(str(job.folder), TwoViews(transform), loader=read_with_pil))


def _open_v2(transform: Callable[[Recipe], v2.Transform], job: Job) -> Iterator[object]:
    views = TwoViews(transform(job.recipe))
    return _batches(job, ImageFolder(str(job.folder), views, loader=decode_file))


def open_pil_crops(job: Job) -> Iterator[object]:
    """Crops by the published loader: two (N, 3, S, S) uint8 views."""
    return _open_pil(lambda recipe: [*_pil_crop(recipe), transforms.PILToTensor()], job)


def open_pil_recipe(job: Job) -> Iterator[object]:
    """The published loader: ImageFolder, PIL transforms; two (N, 3, S, S) float32 views."""
    return _open_pil(pil_recipe, job)


def open_v2_crops(job: Job) -> Iterator[object]:
    """Crops by v2: two (N, 3, S, S) uint8 views."""
    return _open_v2(v2_crop, job)


def open_v2_recipe(job: Job) -> Iterator[object]:
    """The recipe by v2: two (N, 3, S, S) float32 views."""
    return _open_v2(v2_recipe, job)


def pil_fixed_crops(asked: FixedCrops) -> NDArray[np.uint8]:
    """Crops by the PIL peer's operations; see :class:`FixedCrops`."""
    crops_NVSS3 = asked.empty()
    for file, boxes_V4, crops_VSS3 in zip(asked.files, asked.boxes_NV4, crops_NVSS3, strict=True):
        image = read_with_pil(str(file))
        for box, crop_SS3 in zip(boxes_V4.tolist(), crops_VSS3, strict=True):
            crop_SS3[:] = transforms.functional.resized_crop(image, *box, [asked.crop_px, asked.crop_px])
    return crops_NVSS3


def v2_fixed_crops(asked: FixedCrops) -> NDArray[np.uint8]:
    """Crops by the v2 peer's operations; see :class:`FixedCrops`."""
    return cut_pictures(map(decode_file, asked.files), asked)


def cut_pictures(pictures: Iterable[Tensor], asked: FixedCrops) -> NDArray[np.uint8]:
    """The crops asked for out of decoded (3, H, W) uint8 pictures, cut where these are."""
    crops_NVSS3 = asked.empty()
    for picture, boxes_V4, crops_VSS3 in zip(pictures, asked.boxes_NV4, crops_NVSS3, strict=True):
        for box, crop_SS3 in zip(boxes_V4.tolist(), crops_VSS3, strict=True):
            crop = functional.resized_crop(picture, *box, [asked.crop_px, asked.crop_px], antialias=True)
            crop_SS3[:] = crop.permute(1, 2, 0).cpu()
    return crops_NVSS3


_PIL_SENTENCE = (
    "the published MoCo v2 loader: ImageFolder with PIL, one decode for both views, torchvision transforms "
    "in the processes of a DataLoader"
)
_V2_SENTENCE = (
    "torchvision.io.decode_jpeg once for both views, torchvision.transforms.v2 on uint8 tensors with "
    "antialias=True in the processes of a DataLoader"
)
PIL_PEERS = [
    Peer(
        TORCHVISION_PIL,
        crops=Work(open_pil_crops, _PIL_SENTENCE, queued_per_thread=_BATCHES_PER_WORKER),
        recipe=Work(
            open_pil_recipe,
            f"{_PIL_SENTENCE}; blur is PIL's, as published",
            queued_per_thread=_BATCHES_PER_WORKER,
        ),
        fixed_crops=pil_fixed_crops,
        antialiased=True,
    )
]
V2_PEERS = [
    Peer(
        TORCHVISION_V2,
        crops=Work(open_v2_crops, _V2_SENTENCE, queued_per_thread=_BATCHES_PER_WORKER),
        recipe=Work(
            open_v2_recipe,
            f"{_V2_SENTENCE}; the blur's kernel is as wide as ours",
            queued_per_thread=_BATCHES_PER_WORKER,
        ),
        fixed_crops=v2_fixed_crops,
        antialiased=True,
    )
]
