"""Drawn shapes with boxes and outlines, in COCO's layout: a detection set in seconds."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from training.files import write_json

CLASSES = ("disc", "square", "triangle", "star")
_CORNERS = {"disc": 24, "square": 4, "triangle": 3, "star": 10}


@dataclass(frozen=True)
class Shape:
    """One shape in an image."""

    label: int  # of CLASSES
    outline_P2: NDArray[np.float64]  # P corners: x, y in pixels, within the image

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        (left, top), (right, bottom) = self.outline_P2.min(0), self.outline_P2.max(0)
        return float(left), float(top), float(right), float(bottom)


def draw(seed: int, side_px: int) -> tuple[Image.Image, list[Shape]]:
    """Draw a square image of one to four coloured shapes on a mottled ground."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC)
    pen, shapes = ImageDraw.Draw(image), []
    for _ in range(int(rng.integers(1, 5))):
        label = int(rng.integers(len(CLASSES)))
        radius = side_px * rng.uniform(0.1, 0.24)
        centre_2 = rng.uniform(radius, side_px - radius, 2)
        outline_P2 = centre_2 + radius * _unit_outline(CLASSES[label], rng.uniform(0, 2 * math.pi))
        shapes.append(Shape(label, outline_P2))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        pen.polygon([tuple(point) for point in outline_P2.tolist()], fill=colour)
    noise = rng.normal(0, 8, (side_px, side_px, 3))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), np.float64)
    return Image.fromarray(np.clip(blurred + noise, 0, 255).astype(np.uint8)), shapes


def _unit_outline(name: str, turn: float) -> NDArray[np.float64]:
    """Return (P, 2) corners within a circle of radius 1."""
    angle_P = turn + 2 * math.pi * np.arange(_CORNERS[name]) / _CORNERS[name]
    radius_P = np.where(np.arange(len(angle_P)) % 2, 0.45, 1.0) if name == "star" else np.ones(len(angle_P))
    return np.stack([radius_P * np.cos(angle_P), radius_P * np.sin(angle_P)], 1)


def write_coco(folder: Path, count: int, side_px: int, seed: int) -> Path:
    """Write images and ``instances.json`` into a folder; returns that file."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(count):
        image, shapes = draw(seed + number, side_px)
        images.append(
            {"id": number + 1, "file_name": f"{number:06}.png", "width": side_px, "height": side_px}
        )
        image.save(folder / images[-1]["file_name"])
        for shape in shapes:
            left, top, right, bottom = shape.box
            annotation = {"image_id": number + 1, "category_id": shape.label + 1, "iscrowd": 0}
            annotation["id"] = len(annotations) + 1
            box = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            annotations.append(annotation | box | {"segmentation": [shape.outline_P2.flatten().tolist()]})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    file = folder / "instances.json"
    write_json(file, {"images": images, "annotations": annotations, "categories": categories})
    return file
