"""Encoders keep torchvision's keys, features and initialisation."""

import pytest
import torch
import torchvision
from torch import nn

from models.encoders import TORCHVISION_ARCHS, backbone_features, build_encoder


@pytest.mark.parametrize("arch", TORCHVISION_ARCHS)
def test_known_archs_have_torchvisions_keys_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        encoder, feature_dim = build_encoder(arch)
        reference = torchvision.models.get_model(arch, weights=None)
    want = {name: t.shape for name, t in reference.state_dict().items() if not name.startswith("fc.")}
    assert {name: t.shape for name, t in encoder.state_dict().items()} == want
    assert feature_dim == reference.fc.in_features
    assert isinstance(encoder.fc, nn.Identity)


def test_same_seed_gives_torchvisions_weights() -> None:
    torch.manual_seed(3)
    encoder, _ = build_encoder("resnet18")
    torch.manual_seed(3)
    reference = torchvision.models.resnet18()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name


@pytest.mark.parametrize(("arch", "feature_dim", "side"), [("resnet10w16", 128, 16), ("resnet18", 512, 32)])
def test_small_stem_keeps_resolution(arch: str, feature_dim: int, side: int) -> None:
    encoder, dim = build_encoder(arch, small_stem=True)
    assert dim == feature_dim
    seen: list[torch.Size] = []
    encoder.get_submodule("layer1").register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, feature_dim)
    # resnet10w16 halves the side in its first stage, after a stem that keeps it.
    assert seen[0][-2:] == (side, side)


def test_narrow_resnet_is_narrow_and_initialised_like_other_resnets() -> None:
    encoder, _ = build_encoder("resnet10w16")
    assert 250_000 < sum(p.numel() for p in encoder.parameters()) < 350_000
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_backbone_features_do_not_depend_on_the_head() -> None:
    encoder, dim = build_encoder("resnet10w16")
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    encoder.eval()
    want = encoder(images)
    encoder.fc = nn.Linear(dim, 8)
    torch.testing.assert_close(backbone_features(encoder, images), want)


def test_unknown_arch_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"'resnet51'.*resnet18.*resnet10w16"):
        build_encoder("resnet51")
