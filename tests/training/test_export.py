"""Every layout preserves a backbone bit by bit, and every key belongs to one part."""

from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from models.classifier import Classifier
from models.encoders import build_encoder
from models.moco import MoCo
from training import export
from training.checkpoint import CheckpointError, TrainState, save_checkpoint

META = export.BackboneMeta(
    arch="resnet10w16", feature_dim=128, small_stem=False, method="mixmask", mean=(0.5, 0.25, 0.5)
)


def _moco() -> MoCo:
    torch.manual_seed(0)
    moco = MoCo(partial(build_encoder, "resnet10w16"), queue_len=8, dim=4)
    return moco.to(memory_format=torch.channels_last)


def _backbone(moco: MoCo) -> dict[str, torch.Tensor]:
    return {k: v for k, v in moco.encoder_q.state_dict().items() if not k.startswith("fc.")}


def _assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(want) or set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_safetensors_round_trip(tmp_path: Path) -> None:
    moco, path = _moco(), tmp_path / "backbone.safetensors"
    export.save_backbone(path, moco.encoder_q, META)
    state_dict, meta = export.load_backbone(path)
    _assert_same(state_dict, _backbone(moco))
    assert meta == META
    fresh, _ = build_encoder("resnet10w16")
    fresh.load_state_dict(state_dict)


def test_published_round_trip_and_layout(tmp_path: Path) -> None:
    moco, path = _moco(), tmp_path / "published.pth.tar"
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1)
    export.save_published(
        path, epoch=7, arch="resnet10w16", model=moco.state_dict(), optimizer=optimizer.state_dict()
    )
    content = torch.load(path, weights_only=True)
    assert set(content) == {"epoch", "arch", "state_dict", "optimizer"} and content["epoch"] == 7
    keys = set(content["state_dict"])
    assert {"module.encoder_q.fc.0.weight", "module.encoder_k.fc.2.bias", "module.queue_ptr"} <= keys
    assert torch.equal(content["state_dict"]["module.queue"], moco.queue_KD.T)
    assert content["state_dict"]["module.queue_ptr"].shape == (1,)
    state_dict, meta = export.load_backbone(path)
    _assert_same(state_dict, _backbone(moco))
    assert meta == export.BackboneMeta(arch="resnet10w16")


def test_published_resnet50_gives_torchvisions_keys(tmp_path: Path) -> None:
    """The published layout, written by hand around torchvision's ResNet-50."""
    with torch.device("meta"):
        names = list(torchvision.models.resnet50().state_dict())
    backbone = [name for name in names if not name.startswith("fc.")]
    heads = [f"fc.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    state_dict = {f"module.encoder_q.{name}": torch.zeros(1) for name in backbone + heads}
    state_dict |= {f"module.encoder_k.{name}": torch.ones(1) for name in backbone + heads}
    state_dict |= {"module.queue": torch.zeros(128, 4), "module.queue_ptr": torch.zeros(1)}
    path = tmp_path / "published.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state_dict, "optimizer": {}}, path)
    loaded, _ = export.load_backbone(path)
    assert list(loaded) == backbone
    assert all(tensor.item() == 0 for tensor in loaded.values())


def test_our_checkpoint(tmp_path: Path) -> None:
    moco, path = _moco(), tmp_path / "checkpoint.pt"
    save_checkpoint(path, TrainState(1, 0, moco.state_dict(), {}, meta=META.as_strings()))
    state_dict, meta = export.load_backbone(path)
    _assert_same(state_dict, _backbone(moco))
    assert meta == META


def test_our_classifiers_checkpoint(tmp_path: Path) -> None:
    encoder, feature_dim = build_encoder("resnet10w16")
    model, path = Classifier(encoder, feature_dim, 3, frozen=False), tmp_path / "best.pt"
    strings = META.as_strings() | {"best_top1": "0.5"}
    save_checkpoint(path, TrainState(1, 0, model.state_dict(), {}, meta=strings))
    state_dict, meta = export.load_backbone(path)
    _assert_same(state_dict, encoder.state_dict())
    assert meta == META


def test_every_key_of_the_model_is_in_one_part() -> None:
    moco = _moco()
    parts = export.split_state_dict(moco.state_dict())
    sizes = [len(part) for part in (parts.backbone, parts.head, parts.key_encoder, parts.queue)]
    assert sum(sizes) == len(moco.state_dict()) and sizes[1] == 4 and sizes[3] == 2


def test_unknown_layouts_and_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pth.tar"
    torch.save({"net": {}, "loss": 1.0}, path)
    with pytest.raises(CheckpointError, match=r"unknown layout: found the keys \['loss', 'net'\]"):
        export.load_backbone(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="found a list"):
        export.load_backbone(path)
    tensors = {"module.encoder_q.conv1.weight": torch.zeros(1), "module.predictor.weight": torch.zeros(1)}
    torch.save({"arch": "resnet50", "state_dict": tensors}, path)
    with pytest.raises(CheckpointError, match=r"1 of 2 keys are unknown.*module\.predictor\.weight"):
        export.load_backbone(path)
    torch.save({"arch": "resnet50", "state_dict": {"module.queue": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="no encoder_q"):
        export.load_backbone(path)


def test_a_foreign_description_is_ignored_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    tensors = {"conv1.weight": torch.zeros(1)}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert export.load_backbone(path).meta == export.BackboneMeta()
    safetensors.torch.save_file(tensors, path, {"arch": "resnet18", "mean": "0.5 0.5 0.5"})
    damaged = r"description of the backbone in .*backbone.safetensors is damaged"
    with pytest.raises(CheckpointError, match=damaged):
        export.load_backbone(path)


def test_damaged_missing_and_incomplete_files(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    with pytest.raises(CheckpointError, match="there is no backbone"):
        export.load_backbone(path)
    export.save_backbone(path, _moco().encoder_q, META)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        export.load_backbone(path)
    with pytest.raises(ValueError, match=r"meta lacks \['feature_dim'\]"):
        export.save_backbone(path, _moco().encoder_q, export.BackboneMeta(arch="resnet10w16"))
