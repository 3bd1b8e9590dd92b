"""torchvision: the published PIL loader and v2 on uint8 tensors in a DataLoader of processes; v2 on a GPU.

Shape letters: N batch, V views, S side in pixels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

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

from benchmarks.peers import contract
from benchmarks.peers.contract import FixedCrops, Job, Peer, PeerWork, shuffled_batches, synchronizer
from benchmarks.sample_sets import read_with_pil
from pipelines.augment.draws import blur_radius_px
from pipelines.recipe import Recipe

_BATCHES_PER_WORKER = 2
_GPU_BATCHES_AHEAD = 2
# One endless epoch: how a loader starts an epoch is not what is measured.
_ENDLESS = 1 << 40


def _pil_blur(image: Image.Image, sigma_px: tuple[float, float]) -> Image.Image:
    """MoCo v2's published blur: PIL's Gaussian filter with a standard deviation drawn per image."""
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*sigma_px))))


class TwoViews:
    """The published loader's: the same transform applied twice to one decoded image."""

    def __init__(self, transform: Callable[[object], Tensor]) -> None:
        self._transform = transform

    def __call__(self, image: object) -> tuple[Tensor, Tensor]:
        """Query and key view."""
        return self._transform(image), self._transform(image)


def pil_recipe(recipe: Recipe) -> list[object]:
    """The whole augmentation of a PIL image, as transforms in their order."""
    jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue_turns)
    blur = partial(_pil_blur, sigma_px=recipe.blur_sigma_px)
    return [
        transforms.RandomResizedCrop(recipe.crop_px, recipe.crop_scale, recipe.crop_ratio),
        transforms.RandomApply([jitter], recipe.jitter_prob),
        transforms.RandomGrayscale(recipe.grey_prob),
        transforms.RandomApply([blur], recipe.blur_prob),
        transforms.RandomHorizontalFlip(recipe.flip_prob),
        transforms.ToTensor(),
        transforms.Normalize(recipe.mean, recipe.std),
    ]


def _pil_crop(recipe: Recipe) -> list[object]:
    return [pil_recipe(recipe)[0], transforms.PILToTensor()]


def v2_crop(recipe: Recipe) -> v2.Transform:
    """The crop of a (3, H, W) uint8 tensor, antialiased."""
    return v2.RandomResizedCrop(recipe.crop_px, recipe.crop_scale, recipe.crop_ratio, antialias=True)


def v2_recipe(recipe: Recipe) -> v2.Transform:
    """The whole augmentation of a (3, H, W) uint8 tensor; all but the crop is a seventh faster on floats."""
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


def decode_file(path: str | Path, device: torch.device | str = "cpu") -> Tensor:
    """(3, H, W) uint8, on the CPU by torchvision's own libjpeg-turbo."""
    image: Tensor = io.decode_jpeg(io.read_file(str(path)), mode=io.ImageReadMode.RGB, device=device)
    return image


def _on_host(decode: Callable[[str], object], make: Callable[[Recipe], Any], job: Job) -> Iterator[object]:
    """Yield two (N, 3, S, S) views without end; ``make`` returns a transform, or a list of them."""
    made = make(job.recipe)
    transform = transforms.Compose(made) if isinstance(made, list) else made
    dataset = ImageFolder(str(job.folder), TwoViews(transform), loader=decode)
    loader = DataLoader(
        dataset,
        job.batch_size,
        sampler=RandomSampler(dataset, num_samples=_ENDLESS),
        num_workers=job.num_threads,
        prefetch_factor=_BATCHES_PER_WORKER,
        drop_last=True,
        # A server without threads forks the workers; this process has threads, which a fork would not copy.
        multiprocessing_context="forkserver",
    )
    for views, _ in loader:
        yield views


def _on_device(make: Callable[[Recipe], v2.Transform], device: torch.device, job: Job) -> Iterator[object]:
    """Yield (N, V, 3, S, S) views on the device; threads read files while others are decoded."""
    transform = make(job.recipe)
    with ThreadPoolExecutor(job.num_threads) as pool:
        batches = (
            [pool.submit(io.read_file, str(file)) for file in files]
            for files in shuffled_batches(job.folder, job.batch_size)
        )
        ahead = deque(islice(batches, _GPU_BATCHES_AHEAD))
        for batch in batches:
            ahead.append(batch)
            encoded = [read.result() for read in ahead.popleft()]
            # A list, which torchvision documents as faster than one at a time.
            images = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, device=device)
            views = [transform(image) for image in images for _ in range(job.recipe.num_views)]
            yield torch.stack(views).unflatten(0, (len(images), job.recipe.num_views))


def fixed_crops(decode: Callable[[Path], Any], fixed: FixedCrops) -> NDArray[np.uint8]:
    """Crop what ``decode`` returns, PIL's images or tensors, by the peers' operation."""

    def cut(image: Any, *box: int) -> Any:
        crop = functional.resized_crop(image, *box, [fixed.crop_px, fixed.crop_px], antialias=True)
        return crop.permute(1, 2, 0).cpu() if isinstance(crop, Tensor) else crop

    return fixed.cut(map(decode, fixed.files), cut)


_PIL = (
    "the published MoCo v2 loader: ImageFolder with PIL, one decode for both views, torchvision transforms "
    "in the processes of a DataLoader"
)
_V2 = (
    "torchvision.io.decode_jpeg once for both views, torchvision.transforms.v2 on uint8 tensors with "
    "antialias=True in the processes of a DataLoader"
)
_GPU = (
    "torchvision.io.decode_jpeg of a whole batch as a list, by nvJPEG on the GPU, once for both "
    "views; threads read files ahead; torchvision.transforms.v2 on the GPU, one view at a time, since v2 "
    "draws one set of parameters per call"
)
_work = partial(PeerWork, queued_per_thread=_BATCHES_PER_WORKER)
_pil, _v2 = partial(_on_host, read_with_pil), partial(_on_host, decode_file)
PIL_PEERS = [
    Peer(
        contract.TORCHVISION_PIL,
        _work(partial(_pil, _pil_crop), _PIL),
        _work(partial(_pil, pil_recipe), f"{_PIL}; blur is PIL's, as published"),
        partial(fixed_crops, read_with_pil),
    )
]
V2_PEERS = [
    Peer(
        contract.TORCHVISION_V2,
        _work(partial(_v2, v2_crop), _V2),
        _work(partial(_v2, v2_recipe), f"{_V2}; the blur's kernel is as wide as ours"),
        partial(fixed_crops, decode_file),
    )
]


def gpu_peers(device: torch.device) -> list[Peer]:
    """Return v2 on a GPU; on the device ``cpu`` the same code runs there."""
    crops, recipe = (
        PeerWork(partial(_on_device, make, device), _GPU, settle=synchronizer(device))
        for make in (v2_crop, v2_recipe)
    )
    decode = partial(decode_file, device=device)
    return [Peer(contract.TORCHVISION_GPU, crops, recipe, partial(fixed_crops, decode))]
