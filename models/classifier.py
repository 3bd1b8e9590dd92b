"""An encoder with a linear classifier, for the probe and for fine-tuning.

Shape letters: N batch, S side, F features, C classes.
"""

from typing import Self

import torch
from torch import Tensor, nn


def new_classifier(feature_dim: int, num_classes: int) -> nn.Linear:
    """A linear classifier initialised like the published probe: weights from N(0, 0.01²), biases 0."""
    fc = nn.Linear(feature_dim, num_classes)
    nn.init.normal_(fc.weight, std=0.01)
    nn.init.zeros_(fc.bias)
    return fc


class Classifier(nn.Module):
    """An encoder and a linear layer on its features. The linear layer is computed in float32.

    Args:
        encoder: (N, 3, S, S) → (N, F).
        feature_dim: F.
        num_classes: C.
        frozen: do not train the encoder and do not update its BatchNorm statistics.
    """

    def __init__(self, encoder: nn.Module, feature_dim: int, num_classes: int, *, frozen: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = new_classifier(feature_dim, num_classes)
        self.frozen = frozen
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images_N3SS: Tensor) -> Tensor:
        """(N, C) logits."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            feature_NF = self.encoder(images_N3SS)
        with torch.autocast(images_N3SS.device.type, enabled=False):
            logits_NC: Tensor = self.fc(feature_NF.float())
        return logits_NC
