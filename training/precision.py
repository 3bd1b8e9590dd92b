"""The number format of a run.

TF32 has a mantissa of 10 bits. It is off for matrix products and convolutions under every precision. This
does not slow 16-bit runs down: only their logits are computed in float32, and TF32 would be too coarse for
them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from models.losses import true_float32

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The format of the forward pass, and the gradient scaler that goes with it."""

    name: Literal["fp32", "bf16", "fp16"]
    """The chosen format; never "auto"."""
    device: torch.device
    """Device of the forward pass."""
    scaler: torch.amp.GradScaler
    """Scales the loss under fp16, where gradients would underflow; disabled for other formats."""

    @classmethod
    def choose(cls, name: PrecisionName, device: torch.device) -> "Precision":
        """Choose the format for a device; "auto" is bf16 on GPUs that have it, else fp16, and fp32 on CPUs.

        Raises:
            ValueError: for an unknown name, for fp16 on a CPU, and for bf16 on a GPU that lacks it.
        """
        if name not in get_args(PrecisionName):
            raise ValueError(f"precision is {name!r}; choose one of {', '.join(get_args(PrecisionName))}")
        on_gpu = device.type == "cuda"
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            name = ("bf16" if has_bf16 else "fp16") if on_gpu else "fp32"
        if name == "fp16" and not on_gpu:
            raise ValueError(
                f"precision is 'fp16' on {device}; only GPUs compute in it, use 'bf16' or 'fp32'"
            )
        if name == "bf16" and on_gpu and not has_bf16:
            raise ValueError(
                f"precision is 'bf16', which the GPU {device} only emulates; use 'fp16' or 'auto'"
            )
        return cls(name, device, torch.amp.GradScaler(device.type, enabled=name == "fp16"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward pass."""
        return _DTYPES[self.name]

    def autocast(self) -> torch.autocast:
        """A context for the forward pass; disabled under fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")


@contextlib.contextmanager
def settings_of_training() -> Iterator[None]:
    """Turn TF32 off, and cuDNN's search for the fastest convolution on; restore both at the end.

    The shapes in a run never change, so cuDNN searches once for each.
    """
    deterministic = torch.backends.cudnn.deterministic
    cudnn = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=deterministic, allow_tf32=False
    )
    with true_float32(), cudnn:
        yield
