"""The error of a loader's crops, relative to PIL: decode, cut, resize with the antialiased bilinear filter.

Shape letters: N images, V views, S side in pixels.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers.contract import FixedCrops, Job, Peer, image_files
from benchmarks.sample_sets import read_with_pil
from pipelines.augment.draws import draw_boxes
from pipelines.randomness import Draw


def choose_crops(job: Job, num: int) -> FixedCrops:
    """Choose crops of ``num`` images spread over the set, with boxes drawn by the recipe."""
    every = image_files(job.folder)
    index_N = np.unique(np.linspace(0, len(every) - 1, num).astype(np.int64))
    files = tuple(every[index] for index in index_N)
    sizes = [read_with_pil(file).size[::-1] for file in files]
    # Without the fifth number, the flip: it does not affect the accuracy of pixels.
    boxes_NV4 = draw_boxes(job.recipe, Draw(0, 0, index_N), np.array(sizes))[:, :, :4]
    return FixedCrops(job.beton, job.shards, files, index_N, boxes_NV4, job.recipe.crop_px)


def reference_crops(crops: FixedCrops) -> NDArray[np.uint8]:
    """Return (N, V, S, S, 3) uint8 crops by PIL."""
    side = (crops.crop_px, crops.crop_px)

    def cut(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
        return image.crop((left, top, left + width, top + height)).resize(side, Image.Resampling.BILINEAR)

    return crops.cut(map(read_with_pil, crops.files), cut)


def pixel_error(
    peer: Peer, crops: FixedCrops, reference_NVSS3: NDArray[np.uint8]
) -> dict[str, float | str | None]:
    """Return mean and largest absolute difference in grey levels, or None for both with the reason."""
    if isinstance(peer.fixed_crops, str):
        return {"mean_error": None, "max_error": None, "error_reason": peer.fixed_crops}
    difference = np.abs(peer.fixed_crops(crops).astype(np.int16) - reference_NVSS3)
    return {"mean_error": round(float(difference.mean()), 4), "max_error": float(difference.max())}
