"""Sets of images with boxes: registration with Detectron2, and checks before a run.

A set's name in DATASETS is one of Detectron2's (coco_2017_train, voc_2007_test, …, with files below
$DETECTRON2_DATASETS), or ``coco:ANNOTATIONS.json:PICTURES`` or ``voc:FOLDER:SPLIT``, where FOLDER holds
Annotations, ImageSets and JPEGImages.
"""

import contextlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import BoxMode

TOLERANCE_PX = 2.0
"""How far a box may extend beyond its image; some boxes of COCO do, because of rounding."""


def register(names: Iterable[str]) -> None:
    """Register the sets that are named by their files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a name is unknown or malformed, or annotations cannot be read.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        kind, _, rest = name.partition(":")
        first, _, second = rest.rpartition(":")
        if kind not in ("coco", "voc") or not first:
            raise ValueError(
                f"the set {name!r} is neither coco:ANNOTATIONS.json:PICTURES nor voc:FOLDER:SPLIT, nor one "
                "of Detectron2's, such as coco_2017_train and voc_2007_test, with files below "
                "$DETECTRON2_DATASETS; check its name"
            )
        if kind == "coco":
            _check_exist(Path(first), Path(second))
            register_coco_instances(name, {}, first, second)
        else:
            _register_voc(name, Path(first), second)


def _register_voc(name: str, folder: Path, split: str) -> None:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    _check_exist(listing, folder / "Annotations", folder / "JPEGImages")
    with _report_unreadable(name):
        classes = _voc_classes(folder)
    if len(listing.read_text().split()) < 2:
        raise ValueError(f"{name} has fewer than two images, which Detectron2 cannot read; add some")
    # 2012 selects AP as the area under the whole precision-recall curve.
    register_pascal_voc(name, str(folder), split, 2012, classes)
    MetadataCatalog.get(name).set(evaluator_type="pascal_voc")


def check_sets(train: Sequence[str], test: Sequence[str], num_classes: int, *, masks: bool = False) -> None:
    """Check that a detector can be trained and evaluated on these sets.

    Args:
        train: names of the sets to train on.
        test: names of the sets to evaluate on. In a set of VOC's layout, each class must have a box.
        num_classes: number of classes of the detector; all sets must have the same ones.
        masks: whether every box must have an outline, as for training of masks.

    Raises:
        FileNotFoundError: if an image is missing.
        ValueError: for an invalid set; the message names the file, the image and the box.
    """
    names = list(dict.fromkeys((*train, *test)))
    for name in names:
        with _report_unreadable(name):
            dicts = DatasetCatalog.get(name)
        if not dicts:
            raise ValueError(f"the set {name} holds no images; check its annotations")
        if not any(image["annotations"] for image in dicts):
            raise ValueError(f"none of the {len(dicts)} images of {name} has a box; check its annotations")
        for image in dicts:
            _check_image(name, image, num_classes, masks)
        if name in test and MetadataCatalog.get(name).evaluator_type == "pascal_voc":
            _check_class_counts(name, dicts)
    _check_same_classes(names)
    classes = MetadataCatalog.get(names[0]).thing_classes
    if len(classes) != num_classes:
        raise ValueError(
            f"{names[0]} has {len(classes)} classes, MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; give "
            f"MODEL.ROI_HEADS.NUM_CLASSES {len(classes)}"
        )


def _check_image(name: str, image: dict[str, Any], num_classes: int, masks: bool) -> None:
    where = f"{image['file_name']} of {name}"
    if not Path(image["file_name"]).is_file():
        raise FileNotFoundError(f"{where} does not exist; check the folder of the images")
    width, height = image["width"], image["height"]
    for annotation in image["annotations"]:
        with _report_unreadable(name):
            box = list(map(float, annotation["bbox"]))
            x0, y0, x1, y1 = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
        slack = TOLERANCE_PX
        if not (-slack <= x0 <= x1 <= width + slack and -slack <= y0 <= y1 <= height + slack):
            raise ValueError(
                f"the box {[round(side, 1) for side in (x0, y0, x1, y1)]} (left, top, right, bottom) "
                f"in {where} exceeds the image of {width} × {height} px; correct the annotations"
            )
        label = annotation["category_id"]
        if not 0 <= label < num_classes:
            raise ValueError(
                f"a box in {where} has class {label}, MODEL.ROI_HEADS.NUM_CLASSES {num_classes} allows "
                f"0 … {num_classes - 1}"
            )
        if masks and not annotation.get("segmentation"):
            raise ValueError(
                f"a box in {where} has no outline (segmentation), which training of masks needs; add it to "
                "the annotations, or give MODEL.MASK_ON False"
            )


def _check_class_counts(name: str, dicts: list[dict[str, Any]]) -> None:
    """Raise ValueError if a class has no box: VOC's AP, the mean over classes, would then be NaN."""
    meta = MetadataCatalog.get(name)
    with _report_unreadable(name):
        objects = [
            found
            for image in dicts
            for found in parse_rec(str(Path(meta.dirname) / "Annotations" / f"{image['image_id']}.xml"))
        ]
    counted = {found["name"] for found in objects if not found["difficult"]}
    missing = [label for label in meta.thing_classes if label not in counted]
    if missing:
        raise ValueError(
            f"{len(missing)} classes have no box in {name} that is not difficult, the first are "
            f"{missing[:3]}, so AP would be NaN; use a test set that has every class"
        )


def _check_same_classes(names: list[str]) -> None:
    """Raise ValueError unless all sets list the same classes in the same order: a label is an index."""
    first, *others = ((name, list(MetadataCatalog.get(name).thing_classes)) for name in names)
    for other, classes in others:
        if classes != first[1]:
            differing = sorted(set(classes) ^ set(first[1]))
            difference = ", ".join(differing[:5]) if differing else "their order"
            raise ValueError(
                f"the classes of {first[0]} and {other} differ in {difference}; give sets with the same "
                "classes in the same order"
            )


@contextlib.contextmanager
def _report_unreadable(name: str) -> Iterator[None]:
    """Report any error from reading a set's annotations as one ValueError."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        AssertionError,
        AttributeError,
        OSError,
        ValueError,
        ET.ParseError,
    ) as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise ValueError(
            f"the set {name} cannot be read ({str(error) or type(error).__name__}); correct its annotations, "
            f"or $DETECTRON2_DATASETS (now {root}) if it is one of Detectron2's"
        ) from error


def _check_exist(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; check the name of the set")


def _voc_classes(folder: Path) -> list[str]:
    """Sorted classes of all boxes in a folder, so that all its splits have the same."""
    found: set[str] = set()
    for file in (folder / "Annotations").glob("*.xml"):
        try:
            found |= {str(name.text) for name in ET.parse(file).findall("object/name")}
        except ET.ParseError as error:
            raise ValueError(f"{file} is not valid XML: {error}") from error
    return sorted(found)
