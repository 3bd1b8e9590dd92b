"""Sets of pictures with boxes: Detectron2's own, and those given by their files, all checked before a run.

A set's name in DATASETS is one of Detectron2's (coco_2017_train, voc_2007_test, …, whose files lie below
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

TOLERATED_PX = 2.0
"""By how much a box may leave its picture: COCO's own do, by rounding."""


def register(names: Iterable[str]) -> None:
    """Make sets known that are named by their files.

    Raises FileNotFoundError for files that are missing, and ValueError for a name that is unknown or of
    another form and for annotations that cannot be read.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        kind, _, rest = name.partition(":")
        first, _, second = rest.rpartition(":")
        if kind not in ("coco", "voc") or not first:
            raise ValueError(
                f"the set {name!r} is neither coco:ANNOTATIONS.json:PICTURES nor voc:FOLDER:SPLIT, nor one "
                "of Detectron2's, such as coco_2017_train and voc_2007_test, whose files lie below "
                "$DETECTRON2_DATASETS; check its name"
            )
        if kind == "coco":
            _there(Path(first), Path(second))
            register_coco_instances(name, {}, first, second)
        else:
            folder = Path(first)
            _there(
                folder / "ImageSets" / "Main" / f"{second}.txt", folder / "Annotations", folder / "JPEGImages"
            )
            with _readable(name):
                classes = _voc_classes(folder)
            if len((folder / "ImageSets" / "Main" / f"{second}.txt").read_text().split()) < 2:
                raise ValueError(
                    f"{name} has fewer than two pictures, which Detectron2 cannot read; add some"
                )
            # 2012's way of counting: the area under the whole curve.
            register_pascal_voc(name, first, second, 2012, classes)
            MetadataCatalog.get(name).set(evaluator_type="pascal_voc")


def check(train: Sequence[str], test: Sequence[str], num_classes: int, *, masks: bool = False) -> None:
    """Raise ValueError, naming the file, picture and box, for sets that cannot be trained or evaluated on.

    train, test: names; all sets must have the same classes, and in VOC's test sets each must have a box.
    masks: whether every box must have an outline.
    """
    names = list(dict.fromkeys((*train, *test)))
    for name in names:
        with _readable(name):
            dicts = DatasetCatalog.get(name)
        if not dicts:
            raise ValueError(f"the set {name} holds no picture; check its annotations")
        if not any(picture["annotations"] for picture in dicts):
            raise ValueError(f"none of the {len(dicts)} pictures of {name} has a box; check its annotations")
        for picture in dicts:
            _check_picture(name, picture, num_classes, masks)
        if name in test and MetadataCatalog.get(name).evaluator_type == "pascal_voc":
            _check_counted(name, dicts)
    _check_same_classes(names)
    classes = MetadataCatalog.get(names[0]).thing_classes
    if len(classes) != num_classes:
        raise ValueError(
            f"{names[0]} has {len(classes)} classes, MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; give "
            f"MODEL.ROI_HEADS.NUM_CLASSES {len(classes)}"
        )


def _check_picture(name: str, picture: dict[str, Any], num_classes: int, masks: bool) -> None:
    where = f"{picture['file_name']} of {name}"
    if not Path(picture["file_name"]).is_file():
        raise FileNotFoundError(f"{where} is not there; check the folder of the pictures")
    width, height = picture["width"], picture["height"]
    for annotation in picture["annotations"]:
        with _readable(name):
            box = list(map(float, annotation["bbox"]))
            x0, y0, x1, y1 = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
        slack = TOLERATED_PX
        if not (-slack <= x0 <= x1 <= width + slack and -slack <= y0 <= y1 <= height + slack):
            raise ValueError(
                f"the box {[round(side, 1) for side in (x0, y0, x1, y1)]} (left, top, right, bottom) "
                f"in {where} leaves the picture of {width} × {height} px; mend the annotations"
            )
        label = annotation["category_id"]
        if not 0 <= label < num_classes:
            raise ValueError(
                f"a box in {where} has class {label}, MODEL.ROI_HEADS.NUM_CLASSES {num_classes} allows "
                f"0 … {num_classes - 1}"
            )
        if masks and not annotation.get("segmentation"):
            raise ValueError(
                f"a box in {where} has no outline (segmentation), which masks are learned from; mend the "
                "annotations, or give MODEL.MASK_ON False"
            )


def _check_counted(name: str, dicts: list[dict[str, Any]]) -> None:
    """VOC's AP is the mean over all classes, and that of a class without boxes is not a number."""
    meta = MetadataCatalog.get(name)
    with _readable(name):
        objects = [
            found
            for picture in dicts
            for found in parse_rec(str(Path(meta.dirname) / "Annotations" / f"{picture['image_id']}.xml"))
        ]
    counted = {found["name"] for found in objects if not found["difficult"]}
    lacking = [label for label in meta.thing_classes if label not in counted]
    if lacking:
        raise ValueError(
            f"{len(lacking)} classes have no box in {name} that is not difficult, the first are "
            f"{lacking[:3]}, and AP would not be a number; take a test set that has every class"
        )


def _check_same_classes(names: list[str]) -> None:
    """Labels are places in a set's list of classes."""
    first, *others = ((name, list(MetadataCatalog.get(name).thing_classes)) for name in names)
    for other, classes in others:
        if classes != first[1]:
            differing = sorted(set(classes) ^ set(first[1]))
            what = f"{', '.join(differing[:5])}" if differing else "their order"
            raise ValueError(
                f"the classes of {first[0]} and {other} differ in {what}; give sets with the same classes in "
                "the same order"
            )


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what reading a set's annotations raises into one sentence."""
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
            f"the set {name} cannot be read ({str(error) or type(error).__name__}); mend its annotations, or "
            f"$DETECTRON2_DATASETS (here {root}) if it is one of Detectron2's"
        ) from error


def _there(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; check the name of the set")


def _voc_classes(folder: Path) -> list[str]:
    """The classes of all boxes in a folder, sorted: every split of it has the same."""
    found: set[str] = set()
    for file in (folder / "Annotations").glob("*.xml"):
        try:
            found |= {str(name.text) for name in ET.parse(file).findall("object/name")}
        except ET.ParseError as error:
            raise ValueError(f"{file} is no XML: {error}") from error
    return sorted(found)
