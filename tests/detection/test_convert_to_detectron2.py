"""Every key of a backbone is renamed for Detectron2, or the conversion fails."""

import pickle
from pathlib import Path

import pytest
import torch

from detection.convert_to_detectron2 import DEPTHS, Conversion, detectron2_keys, main, to_detectron2
from models.encoders import build_encoder
from training.export import BackboneMeta, fingerprint, save_backbone


def _state(arch: str, **options: bool) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(build_encoder(arch, **options)[0].state_dict())


@pytest.mark.parametrize("arch", DEPTHS)
def test_every_key_is_renamed(arch: str) -> None:
    state = _state(arch)
    renamed, depth = to_detectron2(state, arch)
    assert depth == DEPTHS[arch] and len(renamed) == len(state)
    assert renamed["res5.0.conv1.weight"] is state["layer4.0.conv1.weight"]
    assert renamed["stem.conv1.norm.running_var"] is state["bn1.running_var"]
    assert to_detectron2(state, None)[1] == depth


def test_keys_are_renamed_as_published() -> None:
    names = {
        "conv1.weight": "stem.conv1.weight",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer3.5.downsample.1.bias": "res4.5.shortcut.norm.bias",
        "layer4.2.bn3.num_batches_tracked": "res5.2.conv3.norm.num_batches_tracked",
    }
    assert detectron2_keys(names) == names
    with pytest.raises(ValueError, match=r"2 keys .* no place .*fc.weight.*layer5"):
        detectron2_keys(["fc.weight", "conv1.weight", "layer5.0.conv1.weight"])


def test_encoders_that_detectron2_cannot_build_are_refused() -> None:
    with pytest.raises(ValueError, match="names resnet50, but its tensors are a ResNet-18's"):
        to_detectron2(_state("resnet18"), "resnet50")
    with pytest.raises(ValueError, match="small stem cannot be used"):
        to_detectron2(_state("resnet18", small_stem=True), "resnet18")
    for arch in ("resnet10w16", "wide_resnet50_2", "resnext50_32x4d"):
        with pytest.raises(ValueError, match=f"holds a {arch}, which Detectron2 .* one of resnet18"):
            to_detectron2(_state(arch), arch)
        with pytest.raises(ValueError, match="none of resnet18"):
            to_detectron2(_state(arch), None)
    # The architecture that the file names is checked before its tensors.
    with pytest.raises(ValueError, match="holds a vit_b_16, which Detectron2 cannot build"):
        to_detectron2(_state("resnet50"), "vit_b_16")
    for name in ("layer2.0.bn1.bias", "conv1.weight"):
        incomplete = _state("resnet18")
        del incomplete[name]
        for arch in (None, "resnet18"):
            with pytest.raises(ValueError, match="none of resnet18"):
                to_detectron2(incomplete, arch)


def test_both_formats_hold_the_same_weights(tmp_path: Path) -> None:
    encoder, feature_dim = build_encoder("resnet18")
    source = tmp_path / "backbone.safetensors"
    normalised = {"mean": (0.5, 0.4, 0.2), "std": (0.25, 0.2, 1.0)}
    save_backbone(source, encoder, BackboneMeta(arch="resnet18", feature_dim=feature_dim, **normalised))
    for name in ("a.pth", "a.pkl"):
        main(Conversion(source, tmp_path / name))
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    pickled = pickle.loads((tmp_path / "a.pkl").read_bytes())
    for content in (loaded, pickled):
        assert content["matching_heuristics"] is True and content["__author__"] == "maskmix"
        assert content["pixel_mean"] == pytest.approx([127.5, 102.0, 51.0])
        assert content["pixel_std"] == pytest.approx([63.75, 51.0, 255.0])
        assert content["encoder_sha256"] == fingerprint(encoder.state_dict())
    assert loaded["model"].keys() == pickled["model"].keys() and len(loaded["model"]) == 120
    for name, tensor in loaded["model"].items():
        assert torch.equal(torch.from_numpy(pickled["model"][name]).reshape(tensor.shape), tensor)
    with pytest.raises(ValueError, match=r"ends with neither \.pth nor \.pkl"):
        main(Conversion(source, tmp_path / "a.bin"))


def test_unknown_pixel_statistics_are_left_out(tmp_path: Path) -> None:
    encoder, feature_dim = build_encoder("resnet18")
    save_backbone(tmp_path / "a.safetensors", encoder, BackboneMeta(arch="resnet18", feature_dim=feature_dim))
    main(Conversion(tmp_path / "a.safetensors", tmp_path / "a.pth"))
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content.keys() == {"model", "__author__", "matching_heuristics", "encoder_sha256", "sha256"}
