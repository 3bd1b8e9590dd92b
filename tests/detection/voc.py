"""Drawn shapes in VOC's layout."""

from pathlib import Path

from benchmarks.shapes import CLASSES, Shape, draw


def write_voc(folder: Path, counts: dict[str, int], side_px: int, seed: int) -> Path:
    """Write a VOC folder with ``counts`` images in each split; returns it."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    number = 0
    for split, count in counts.items():
        names = [f"{number + i:06}" for i in range(count)]
        number += count
        for name in names:
            image, shapes = draw(seed + int(name), side_px)
            image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            size = f"<size><width>{side_px}</width><height>{side_px}</height><depth>3</depth></size>"
            objects = "".join(map(_voc_object, shapes))
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def _voc_object(shape: Shape) -> str:
    # VOC counts pixels from 1, both ends included.
    left, top, right, bottom = (round(side) for side in shape.box)
    box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    about = "<pose>x</pose><truncated>0</truncated><difficult>0</difficult>"
    return f"<object><name>{CLASSES[shape.label]}</name>{about}<bndbox>{box}</bndbox></object>"
