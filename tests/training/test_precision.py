"""The meaning of "auto", and precisions that a device lacks."""

import pytest
import torch

from training.precision import Precision

CPU = torch.device("cpu")


def test_auto_is_fp32_on_a_cpu_and_autocast_does_nothing() -> None:
    precision = Precision.choose("auto", CPU)
    assert precision.name == "fp32" and not precision.scaler.is_enabled()
    with precision.autocast():
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.float32


def test_bf16_works_on_a_cpu() -> None:
    with Precision.choose("bf16", CPU).autocast():
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.bfloat16


def test_fp16_on_a_cpu_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'fp16' on cpu; only GPUs compute in it, use 'bf16' or 'fp32'"):
        Precision.choose("fp16", CPU)
    with pytest.raises(ValueError, match="precision is 'fp8'; choose one of auto, fp32, bf16, fp16"):
        Precision.choose("fp8", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu_is_a_16_bit_format() -> None:
    precision = Precision.choose("auto", torch.device("cuda"))
    assert precision.name in ("bf16", "fp16")
    assert precision.scaler.is_enabled() == (precision.name == "fp16")
