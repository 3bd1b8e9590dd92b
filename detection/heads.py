"""The C4 detector's head with a norm after res5, as in MoCo's transfer to detection (arXiv 1911.05722)."""

from typing import Any

from detectron2.config import configurable
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Res5ROIHeads whose res5 ends in a norm, ``res5.norm``: pretrained features have not been normalised."""

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        """The parts of Res5ROIHeads, with the norm."""
        parts: dict[str, Any] = super().from_config(cfg, input_shape)
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8
        parts["res5"].add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return parts
