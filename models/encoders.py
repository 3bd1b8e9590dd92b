"""ResNets by name, with the usual stem or a stem for small images. Heads replace their ``.fc``.

Shape letters: N batch, S side in pixels, F features.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet

NormLayer = Callable[[int], nn.Module]
"""Returns a normalisation layer for a number of channels."""

TORCHVISION_ARCHS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
ARCHS = (*TORCHVISION_ARCHS, "resnet10w16")


class EncoderFactory(Protocol):
    """Builds an encoder with a given norm layer; for example ``partial(build_encoder, "resnet50")``."""

    def __call__(self, *, norm_layer: NormLayer) -> tuple[nn.Module, int]:
        """Build an encoder with an ``fc`` that can be replaced; returns it and its number of features F."""
        ...


class _NarrowResNet(ResNet):
    """Four stages of one BasicBlock each, with 16 … 128 channels: 0.3 M parameters, for demos on a CPU.

    Every stage halves the side, also the first one, unlike in other ResNets. That halves the time.
    time.
    """

    def __init__(self, norm_layer: NormLayer) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        self.inplanes = 16
        self.bn1 = norm_layer(16)
        self.layer1 = self._make_layer(BasicBlock, 16, 1, stride=2)
        self.layer2 = self._make_layer(BasicBlock, 32, 1, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 64, 1, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 128, 1, stride=2)
        self.fc = nn.Linear(128, 1000)
        _use_small_stem(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _use_small_stem(encoder: ResNet) -> None:
    """Replace the 7×7 stride-2 convolution and the max-pool, which would reduce an image of 32 px to 8×8."""
    encoder.conv1 = nn.Conv2d(3, encoder.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.maxpool = nn.Identity()


def build_encoder(
    arch: str, *, small_stem: bool = False, norm_layer: NormLayer = nn.BatchNorm2d
) -> tuple[nn.Module, int]:
    """Build a freshly initialised ResNet with an identity as ``fc``.

    Args:
        arch: one of `ARCHS`; "resnet10w16" always has the small stem, the others are torchvision's.
        small_stem: a 3×3 stride-1 first convolution and no max-pool, for images of 32 … 64 px.
        norm_layer: replaces BatchNorm2d.

    Returns:
        The ResNet and its number of features F.

    Raises:
        ValueError: if ``arch`` is unknown.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch is {arch!r}; choose one of {', '.join(ARCHS)}")
    if arch == "resnet10w16":
        resnet: ResNet = _NarrowResNet(norm_layer)
    else:
        resnet = get_model(arch, weights=None, norm_layer=norm_layer)
        if small_stem:
            _use_small_stem(resnet)
    feature_dim = resnet.fc.in_features
    encoder: nn.Module = resnet
    encoder.fc = nn.Identity()
    return encoder, feature_dim


def backbone_features(encoder: nn.Module, images_N3SS: Tensor) -> Tensor:
    """(N, F) features of a ResNet before its ``fc``."""
    resnet: ResNet = encoder
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images_N3SS))))
    x = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))
    features_NF: Tensor = resnet.avgpool(x).flatten(1)
    return features_NF
