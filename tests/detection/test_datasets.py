"""Sets that a detector cannot be trained or evaluated on are refused with a clear message."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.shapes import CLASSES
from tests.detection.voc import write_voc

if os.environ.get("CI"):
    import detectron2  # noqa: F401
else:
    pytest.importorskip("detectron2")

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from detection import datasets


def _changed(name: str, path: Path, **content: object) -> str:
    """Write a coco: set with changed content and return its name."""
    _, file, folder = name.split(":")
    path.write_text(json.dumps(json.loads(Path(file).read_text()) | content))
    return f"coco:{path}:{folder}"


def _check(train: list[str], test: list[str]) -> None:
    datasets.register((*train, *test))
    datasets.check_sets(train, test, len(CLASSES))


def test_splits_of_a_folder_have_the_same_classes(sets: dict[str, str]) -> None:
    _check([sets["trainval"]], [sets["test"]])
    datasets.register([sets["val"]])
    for split in ("trainval", "test", "val"):
        assert MetadataCatalog.get(sets[split]).thing_classes == sorted(CLASSES)


def test_voc_evaluation_needs_a_box_of_every_class(sets: dict[str, str], tmp_path: Path) -> None:
    _check([sets["val"]], [sets["test"]])
    with pytest.raises(
        ValueError, match=r"1 classes have no box in \S+:val that is not difficult.*\['disc'\]"
    ):
        _check([sets["trainval"]], [sets["val"]])
    voc = write_voc(tmp_path / "voc", {"test": 4}, 96, seed=100)
    for file in (voc / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<difficult>0<", "<difficult>1<"))
    with pytest.raises(ValueError, match=r"4 classes have .* first are \['disc', 'square', 'star'\]"):
        _check([], [f"voc:{voc}:test"])


def test_classes_must_agree(sets: dict[str, str], tmp_path: Path) -> None:
    named = [{"id": number, "name": name} for number, name in enumerate(("ring", *CLASSES[1:]), start=1)]
    renamed = _changed(sets["coco"], tmp_path / "renamed.json", categories=named)
    with pytest.raises(
        ValueError, match=r"instances\.json:.* and \S+renamed\.json:\S+ differ in disc, ring;"
    ):
        _check([sets["coco"]], [renamed])
    turned = [{"id": number, "name": name} for number, name in enumerate(reversed(CLASSES), start=1)]
    reordered = _changed(sets["coco"], tmp_path / "reordered.json", categories=turned)
    with pytest.raises(ValueError, match="differ in their order; give sets with the same classes"):
        _check([sets["coco"]], [reordered])
    with pytest.raises(ValueError, match=r"differ in their order"):
        _check([sets["coco"]], [sets["test"]])


def test_unknown_names_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'mine' is neither coco:.*nor one of Detectron2's.*DETECTRON2_DATASETS"
    ):
        datasets.register(["mine"])
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        datasets.register([f"coco:{tmp_path}/none.json:{tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"Main/train\.txt does not exist"):
        datasets.register([f"voc:{tmp_path}:train"])
    name = f"gone from {tmp_path}"
    register_coco_instances(name, {}, f"{tmp_path}/gone.json", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"set gone from .* cannot be read \(.*gone\.json.*\$DETECTRON2_DATASETS"
    ):
        _check([], [name])


def test_unreadable_annotations_are_refused(sets: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(
        ValueError, match=r"cut\.json\S+ cannot be read \(Expecting value.*correct its annotations"
    ):
        _check([], [f"coco:{tmp_path}/cut.json:{tmp_path}"])
    (tmp_path / "bare.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"bare\.json\S+ cannot be read \('categories'\)"):
        _check([], [f"coco:{tmp_path}/bare.json:{tmp_path}"])
    voc = write_voc(tmp_path / "voc", {"test": 4}, 96, seed=100)
    (voc / "Annotations" / "000002.xml").write_text("<annotation><size>")
    with pytest.raises(ValueError, match=r"cannot be read \(\S+000002\.xml is not valid XML: "):
        _check([], [f"voc:{voc}:test"])


def test_invalid_images_and_boxes_are_refused(sets: dict[str, str], tmp_path: Path) -> None:
    _, file, _ = sets["coco"].split(":")
    content = json.loads(Path(file).read_text())
    nothing = _changed(sets["coco"], tmp_path / "nothing.json", images=[], annotations=[])
    with pytest.raises(ValueError, match="holds no images"):
        _check([nothing], [sets["coco"]])
    without = _changed(sets["coco"], tmp_path / "without.json", annotations=[])
    with pytest.raises(ValueError, match=r"none of the 6 images of .* has a box"):
        _check([without], [sets["coco"]])
    content["annotations"][0]["bbox"] = [90.0, 10.0, 20.0, 20.0]
    leaving = _changed(sets["coco"], tmp_path / "leaving.json", annotations=content["annotations"])
    with pytest.raises(
        ValueError, match=r"\[90\.0, 10\.0, 110\.0, 30\.0\].* exceeds the image of 96 × 96 px"
    ):
        _check([leaving], [sets["coco"]])
    content["annotations"][0]["bbox"] = [1.0, 10.0, "20"]
    cut = _changed(sets["coco"], tmp_path / "cut-box.json", annotations=content["annotations"])
    with pytest.raises(ValueError, match=r"cut-box\.json\S+ cannot be read .*correct its annotations"):
        _check([cut], [sets["coco"]])
    content = json.loads(Path(file).read_text())
    del content["annotations"][2]["segmentation"]
    bare = _changed(sets["coco"], tmp_path / "no-outline.json", annotations=content["annotations"])
    _check([bare], [sets["coco"]])
    with pytest.raises(ValueError, match=r"has no outline \(segmentation\).*give MODEL.MASK_ON False"):
        datasets.check_sets([bare], [sets["coco"]], len(CLASSES), masks=True)
    absent = f"coco:{file}:{tmp_path}"
    with pytest.raises(FileNotFoundError, match=r"000000\.png of coco:\S+ does not exist; check the folder"):
        _check([absent], [sets["coco"]])
    voc = write_voc(tmp_path / "single", {"test": 1}, 96, seed=100)
    with pytest.raises(ValueError, match="fewer than two images"):
        _check([], [f"voc:{voc}:test"])
    with pytest.raises(ValueError, match=r"has class 3, MODEL.ROI_HEADS.NUM_CLASSES 3 allows 0 … 2"):
        datasets.check_sets([], [sets["coco"]], 3)
