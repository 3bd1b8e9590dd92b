"""Draws a sheet of what the loader makes of images: crops, views, masks and mixtures."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines import Batch, ViewLoader, build_loader
from pipelines.augment.mixing import cell_of_pixel, draw_masks
from pipelines.decode.pillow import decode_image
from pipelines.randomness import Draw
from pipelines.recipe import Mixing, moco_v2
from training.files import write_atomically

_QUERY_COLOUR, _KEY_COLOUR = "#e8590c", "#1c7ed6"
_TITLES = (
    "image and its two crops",
    "query view",
    "key view",
    "mixed in: another\nquery of the batch",
    "mask: white keeps\nthe row's own pixels",
    "MixMask",
    "Un-Mix",
)


def preview(
    data: str | Path, out: str | Path, *, rows: int = 6, crop_px: int = 224, grid_size: int = 8, seed: int = 0
) -> Path:
    """Draw the sheet for the first batch that a run with this seed would see.

    Args:
        data: a compiled set or a folder.
        out: the PNG to write.
        rows: images on the sheet, at least 2.
        crop_px: side of the views.
        grid_size: cells along a side of the mask.
        seed: seed of the run.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``rows`` is less than 2 or more than the number of images in the set.
    """
    if rows < 2:
        raise ValueError(f"rows is {rows}; mixtures need at least 2 images")
    mixing = Mixing(method="both", grid_size=grid_size, mask_per="image")
    loader = build_loader(data, moco_v2(crop_px, mixing), batch_size=rows, seed=seed)
    batch = next(iter(loader))
    cell_S = cell_of_pixel(grid_size, crop_px)
    masks = torch.from_numpy(draw_masks(mixing, Draw(seed, 0, batch.index.numpy())))[:, cell_S][:, :, cell_S]

    # Draw to a file, without a window.
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, len(_TITLES), figsize=(2.1 * len(_TITLES), 2.25 * rows), dpi=80)
    figure.suptitle(
        "What the model receives: two augmented views of each image, and mixtures of queries. "
        "λ is the share of the row's own image.",
        fontsize=13,
    )
    for row in range(rows):
        _draw_row(axes[row], row, loader, batch, masks)
    for axis, title in zip(axes[0], _TITLES, strict=True):
        axis.set_title(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    write_atomically(Path(out), lambda file: figure.savefig(file, format="png"))
    plt.close(figure)
    return Path(out)


def _draw_row(axes: Any, row: int, loader: ViewLoader, batch: Batch, masks: Tensor) -> None:
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    index = batch.index[row : row + 1].numpy()
    image = decode_image(loader.set.fetch(index))
    assert image is not None, "the loader has just decoded it"
    axes[0].imshow(image)
    axes[0].set_ylabel(f"row {row + 1}", fontsize=11)
    for box, colour in zip(loader.boxes(0, index)[0], (_QUERY_COLOUR, _KEY_COLOUR), strict=True):
        top, left, height, width = (int(x) for x in box[:4])
        axes[0].add_patch(
            matplotlib.patches.Rectangle(
                (left, top), width, height, fill=False, edgecolor=colour, linewidth=2.5
            )
        )
    unmix, mixmask = batch.mixtures
    partner = int(mixmask.partner[row])
    for axis, view, colour in (
        (axes[1], batch.query[row], _QUERY_COLOUR),
        (axes[2], batch.key[row], _KEY_COLOUR),
    ):
        axis.imshow(_to_image(view, loader))
        for spine in axis.spines.values():
            spine.set(edgecolor=colour, linewidth=2.5)
    axes[3].imshow(_to_image(batch.query[partner], loader))
    axes[3].set_xlabel(f"query of row {partner + 1}", fontsize=10)
    axes[4].imshow(masks[row], cmap="gray", vmin=0, vmax=1)
    for axis, mixture in zip(axes[5:], (mixmask, unmix), strict=True):
        lam = float(mixture.lam[row])
        axis.imshow(_to_image(mixture.images[row], loader))
        axis.set_xlabel(
            f"λ = {lam:.2f} of row {row + 1}, {1 - lam:.2f} of row {int(mixture.partner[row]) + 1}",
            fontsize=9,
        )


def _to_image(view: Tensor, loader: ViewLoader) -> npt.NDArray[np.uint8]:
    """(3, S, S) normalised → (S, S, 3) uint8."""
    mean, std = torch.tensor(loader.recipe.mean), torch.tensor(loader.recipe.std)
    pixels = (view.permute(1, 2, 0) * std + mean) * 255
    image: npt.NDArray[np.uint8] = pixels.round().clamp(0, 255).byte().numpy()
    return image
