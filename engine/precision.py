"""In which number format a run computes."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The format of the forward pass and the gradient scaler that goes with it."""

    name: Literal["fp32", "bf16", "fp16"]
    """What was chosen; never "auto"."""
    device: torch.device
    """Where it applies."""
    scaler: torch.amp.GradScaler
    """Scales the loss under fp16, whose gradients underflow; disabled, and a no-op, otherwise."""

    @classmethod
    def choose(cls, name: PrecisionName, device: torch.device) -> "Precision":
        """Pick a format for ``device``; with 16 bits, what stays float32 may use TF32 products on GPUs.

        "auto" is bf16 on GPUs that compute in it, fp16 on older ones and fp32 on CPUs.
        Raises ValueError for an unknown name, for fp16 on a CPU and for bf16 on a GPU that lacks it.
        """
        if name not in get_args(PrecisionName):
            raise ValueError(f"precision is {name!r}; choose one of {', '.join(get_args(PrecisionName))}")
        on_gpu = device.type == "cuda"
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            name = ("bf16" if has_bf16 else "fp16") if on_gpu else "fp32"
        if name == "fp16" and not on_gpu:
            raise ValueError(
                f"precision is 'fp16' on {device}; only GPUs compute in it, take 'bf16' or 'fp32'"
            )
        if name == "bf16" and on_gpu and not has_bf16:
            raise ValueError(
                f"precision is 'bf16', which the GPU {device} only emulates; take 'fp16' or 'auto'"
            )
        if on_gpu and name != "fp32":
            torch.set_float32_matmul_precision("high")
        return cls(name, device, torch.amp.GradScaler(device.type, enabled=name == "fp16"))

    def autocast(self) -> torch.autocast:
        """A context for the forward pass; it does nothing under fp32."""
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")
