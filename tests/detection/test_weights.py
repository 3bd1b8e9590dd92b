"""Weights for another detector or another pixel normalisation are refused before training."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from models.encoders import build_encoder
from tests.detection.conftest import CONFIGS, write_weights

if os.environ.get("CI"):
    import detectron2  # noqa: F401
else:
    pytest.importorskip("detectron2")

from detection import config, weights

C4, FPN = "coco_R_50_C4_1x", "coco_R_50_FPN_1x"


def _check(path: Path, name: str, *options: str) -> None:
    argv = ["--config-file", str(CONFIGS / f"{name}.yaml"), "MODEL.WEIGHTS", str(path), *options]
    weights.check_weights(config.configure(config.parse(argv, None)))


def _num_tensors_of_101_alone() -> int:
    """Tensors of ResNet-101 that ResNet-50 lacks, without the counts of batches."""
    with torch.device("meta"):
        deep, shallow = (build_encoder(arch)[0].state_dict() for arch in ("resnet101", "resnet50"))
    return len([key for key in deep.keys() - shallow.keys() if not key.endswith("num_batches_tracked")])


def test_weights_that_fit_are_accepted(tmp_path: Path) -> None:
    near = [124.0, 116.0, 103.9]  # 123.675, 116.28, 103.53 in the config
    write_weights("resnet50", tmp_path / "c4.pth", pixel_mean=near, pixel_std=[58.0, 57.0, 57.0])
    _check(tmp_path / "c4.pth", C4)
    _check(tmp_path / "c4.pth", C4, "MODEL.RESNETS.NORM", "FrozenBN")
    write_weights("resnet18", tmp_path / "fpn.pth")
    _check(tmp_path / "fpn.pth", FPN, "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64")


def test_a_published_pickle_is_accepted(tmp_path: Path) -> None:
    """It includes the classifier, and its pixel statistics are not read."""
    write_weights("resnet50", tmp_path / "weights.pth")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)["model"]
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    arrays["stem.fc.bias"] = torch.zeros(1000).numpy()
    content = {"model": arrays, "__author__": "x", "matching_heuristics": True, "pixel_mean": [0.0] * 3}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content))
    _check(tmp_path / "weights.pkl", C4)


def test_another_depth_is_refused(tmp_path: Path) -> None:
    count = _num_tensors_of_101_alone()
    assert count == 17 * 3 * 5  # blocks, convolutions with their norms, tensors of both
    write_weights("resnet50", tmp_path / "50.pth")
    message = (
        rf"^{count} of the backbone's tensors are not in \S+50\.pth, .*\['backbone\.res4\.6\.conv1\.weight', "
    )
    with pytest.raises(ValueError, match=message + ".*MODEL.RESNETS.DEPTH is 101, give the one that"):
        _check(tmp_path / "50.pth", C4, "MODEL.RESNETS.DEPTH", "101")
    write_weights("resnet101", tmp_path / "101.pth")
    message = rf"^{count} tensors of \S+101\.pth have no place in the detector, .*'res4\.\d+\.conv"
    with pytest.raises(ValueError, match=message):
        _check(tmp_path / "101.pth", C4)


def test_another_pixel_normalisation_is_refused(tmp_path: Path) -> None:
    halves = [127.5, 127.5, 127.5]
    write_weights("resnet50", tmp_path / "mean.pth", pixel_mean=halves, pixel_std=[58.395, 57.12, 57.375])
    with pytest.raises(
        ValueError, match=r"PIXEL_MEAN is \[123\.675, .* with \[127\.5, .*give MODEL\.PIXEL_MEAN '\["
    ):
        _check(tmp_path / "mean.pth", C4)
    write_weights("resnet50", tmp_path / "std.pth", pixel_std=[58.395, 57.12, 57.9])
    with pytest.raises(ValueError, match=r"give MODEL\.PIXEL_STD '\[58\.395, 57\.12, 57\.9\]'"):
        _check(tmp_path / "std.pth", C4)
    _check(tmp_path / "std.pth", C4, "MODEL.PIXEL_STD", "[58.395, 57.12, 57.9]")


def test_metadata_of_the_converter_is_read(tmp_path: Path) -> None:
    write_weights("resnet18", tmp_path / "a.pth", pixel_mean=[1.0, 2.0, 3.0], encoder_sha256="ab", other=1)
    assert weights.read_metadata(str(tmp_path / "a.pth")) == {
        "pixel_mean": [1.0, 2.0, 3.0],
        "encoder_sha256": "ab",
    }
    (tmp_path / "a.pkl").write_bytes(b"not read")
    for file in (str(tmp_path / "a.pkl"), "detectron2://a.pth", ""):
        assert weights.read_metadata(file) == {}
