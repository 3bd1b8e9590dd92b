"""The loaders that ours is measured against, each as its own documentation says it is fastest."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pipelines.recipe import Recipe


class _PILBlur:
    """MoCo v2's published blur: PIL's Gaussian filter with a standard deviation drawn per picture."""

    def __init__(self, low_px: float, high_px: float) -> None:
        self._low_px, self._high_px = low_px, high_px

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(self._low_px, self._high_px))
        return image.filter(ImageFilter.GaussianBlur(sigma))


class _TwoViews:
    """The published loader's: the same transform applied twice to one decoded picture."""

    def __init__(self, transform: transforms.Compose) -> None:
        self._transform = transform

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return self._transform(image), self._transform(image)


def torchvision_pil(
    folder: Path, recipe: Recipe, batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The published MoCo v2 loader: ImageFolder, PIL transforms, DataLoader processes; endless.

    Args:
        folder: a tree of class folders.
        recipe: its crop, jitter, grey, blur and normalisation are written as torchvision transforms.
        batch_size: pictures per batch.
        num_workers: loader processes.

    Yields:
        Two (N, 3, S, S) float32 views.
    """
    jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue_turns)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.crop_px, recipe.crop_scale, recipe.crop_ratio),
            transforms.RandomApply([jitter], recipe.jitter_prob),
            transforms.RandomGrayscale(recipe.grey_prob),
            transforms.RandomApply([_PILBlur(*recipe.blur_sigma_px)], recipe.blur_prob),
            transforms.RandomHorizontalFlip(recipe.flip_prob),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(folder), _TwoViews(transform)),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )
    while True:
        for views, _ in loader:
            yield views[0], views[1]
