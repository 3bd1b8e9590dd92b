"""SplitBatchNorm2d against one BatchNorm per part; the shuffles against their inverses."""

import copy
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.batchnorm import (
    NormArguments,
    SplitBatchNorm2d,
    _send_sizes,
    _SplitBatchNorm,
    missing_for_kernels,
    shuffle_across_splits,
    split_batch_norm_for_compiler,
    unshuffle_across_splits,
)

ROOT = Path(__file__).resolve().parents[2]


def _images(batch_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, batch_size + 1).view(-1, 1, 1, 1)
    return torch.randn(batch_size, 5, 4, 4, generator=generator) * scale + scale


def test_training_is_one_batchnorm_for_each_part() -> None:
    split, plain = SplitBatchNorm2d(5, 3), nn.BatchNorm2d(5)
    nn.init.normal_(split.weight)
    plain.load_state_dict(split.state_dict())
    parts = [copy.deepcopy(plain) for _ in range(3)]
    images = _images(12)
    want = torch.cat([part(chunk) for part, chunk in zip(parts, images.chunk(3), strict=True)])
    torch.testing.assert_close(split(images), want)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            split.get_buffer(name), torch.stack([part.get_buffer(name) for part in parts]).mean(0)
        )
    assert split.get_buffer("num_batches_tracked") == 1


def test_eval_and_a_single_split_are_plain_batchnorm() -> None:
    images, plain = _images(12), nn.BatchNorm2d(5)
    plain(images)
    for split in (SplitBatchNorm2d(5, 1), SplitBatchNorm2d(5, 4)):
        split.load_state_dict(plain.state_dict())
        torch.testing.assert_close(split.eval()(images), copy.deepcopy(plain).eval()(images))
    single, other = SplitBatchNorm2d(5, 1), nn.BatchNorm2d(5)
    torch.testing.assert_close(single(images), other(images))
    torch.testing.assert_close(single.get_buffer("running_var"), other.get_buffer("running_var"))


def test_state_dict_keys_are_batchnorms() -> None:
    assert list(SplitBatchNorm2d(5, 4).state_dict()) == list(nn.BatchNorm2d(5).state_dict())


def test_gradient_is_that_of_the_parts() -> None:
    split, plain = SplitBatchNorm2d(5, 2).double(), nn.BatchNorm2d(5).double()
    ours, reference = (_images(6).double().requires_grad_() for _ in range(2))
    split(ours).square().mul(_images(6, 1)).sum().backward()
    torch.cat([plain(chunk) for chunk in reference.chunk(2)]).square().mul(_images(6, 1)).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad)
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


def _by_parts(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor,
    num_splits: int, momentum: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Compute one torch BatchNorm for each part, and the mean of their running statistics."""
    means, variances = mean.repeat(num_splits, 1), var.repeat(num_splits, 1)
    parts = zip(input.chunk(num_splits), means, variances, strict=True)
    output = torch.cat([F.batch_norm(part, m, v, weight, bias, True, momentum, eps) for part, m, v in parts])
    mean.copy_(means.mean(0))
    var.copy_(variances.mean(0))
    return output


def _everything(
    way: Callable[..., torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...], num_splits: int
):
    """Output, gradients and running statistics of one implementation."""
    generator = torch.Generator().manual_seed(0)
    channels, place = shape[1], torch.arange(shape[0]).view(-1, 1, 1, 1) + 1
    images = torch.randn(shape, generator=generator) * place + 10 * place
    weight, bias, mean, var = torch.rand(4, channels, generator=generator)
    factor = torch.randn(shape, generator=generator)
    leaf = images.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = torch.float64 if way is _by_parts else torch.promote_types(dtype, torch.float32)
    scale, shift, mean, var = (x.to(exact) for x in (weight, bias, mean, var))
    # The reference gets the same rounded images.
    output = way(
        *(leaf.to(exact) if way is _by_parts else leaf, scale.requires_grad_(), shift.requires_grad_()),
        *(mean, var, num_splits, 0.1, 1e-5),
    )
    (output * factor.to(output.dtype)).sum().backward()
    found = {"output": output, "input": leaf.grad, "weight": scale.grad, "bias": shift.grad}
    return {name: x.detach().double() for name, x in (found | {"mean": mean, "var": var}).items()}


def _for_compiler(input: torch.Tensor, *rest: Any) -> torch.Tensor:
    return split_batch_norm_for_compiler(input, NormArguments(*rest))


SHAPES = [((12, 5, 4, 4), 3), ((16, 70, 7, 7), 8), ((8, 64, 33, 33), 2), ((32, 130, 1, 1), 8)]


@pytest.mark.parametrize(("shape", "num_splits"), SHAPES)
@pytest.mark.parametrize("way", [_SplitBatchNorm.apply, _for_compiler])
def test_both_implementations_are_one_batchnorm_for_each_part(
    way: Callable[..., torch.Tensor], shape: tuple[int, ...], num_splits: int
) -> None:
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
        ours, want = (_everything(w, dtype, shape, num_splits) for w in (way, _by_parts))
        for name in want:
            error = (ours[name] - want[name]).abs().max() / want[name].abs().max().clamp_min(1e-3)
            assert error < bound, (name, dtype, error)


_IN_THE_INTERPRETER = """
import torch
from models import batchnorm, batchnorm_triton

for shape, num_splits in {shapes}:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if shape[0] % 3 == 0 else torch.float32
    place = torch.arange(shape[0]).view(-1, 1, 1, 1) + 1
    images = torch.randn(shape, generator=generator) * place + 10 * place
    x, grad = (
        t.to(dtype).contiguous(memory_format=torch.channels_last)
        for t in (images, torch.randn(shape, generator=generator))
    )
    weight, bias, mean, var = torch.rand(4, shape[1], generator=generator).to(dtype)
    running = [(mean.clone(), var.clone()) for _ in range(2)]
    ours = batchnorm_triton.forward(
        x, batchnorm.NormArguments(weight, bias, *running[0], num_splits, 0.1, 1e-5)
    )
    cpus = batchnorm.split_batch_norm(x, weight, bias, *running[1], num_splits, 0.1, 1e-5)
    ours_back = batchnorm_triton.backward(grad, x, weight, *ours[1:])
    cpus_back = batchnorm.split_batch_norm_backward(grad, x, weight, *cpus[1:], 1e-5)
    pairs = zip((*ours, *ours_back, *running[0]), (*cpus, *cpus_back, *running[1]), strict=True)
    for number, (left, right) in enumerate(pairs):
        assert left.stride() == right.stride() and left.dtype == right.dtype, (shape, number)
        error = (left - right).abs().max() / right.abs().max()
        assert error < (1e-12 if dtype == torch.float64 else 1e-5), (shape, number, error)
"""


def test_gpu_kernels_compute_what_the_cpu_does() -> None:
    """Run the kernels in Triton's interpreter, which must be selected before Triton is imported."""
    pytest.importorskip("triton")
    program = _IN_THE_INTERPRETER.format(shapes=[*SHAPES[:2], ((8, 70, 13, 13), 2)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter is older than this NumPy and takes its arrays for numbers")
    assert done.returncode == 0, done.stderr


def test_missing_requirements_of_kernels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = missing_for_kernels.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("triton")
    assert look() == "there is no C compiler (gcc or clang): apt-get install gcc"
    monkeypatch.setenv("CC", "icc")
    assert look() == "there is no C compiler (icc): apt-get install gcc"
    (tmp_path / "icc").touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert look() == "Python's headers are not installed: apt-get install python3-dev"
    (tmp_path / "Python.h").touch()
    assert look() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert look() == "Triton is not installed: pip install triton"


def _types(arguments: list[str]) -> dict[str, str]:
    """Types of a kernel's arguments by name: images are bf16, all other memory is float32."""
    kinds = dict.fromkeys(("M", "C", "G", "B", "block_rows"), "i32")
    kinds |= dict.fromkeys(("momentum", "eps"), "fp32") | dict.fromkeys(("x", "y", "dy", "dx"), "*bf16")
    kinds |= dict.fromkeys(("ROWS", "CHANNELS", "FLOAT", "PARTS", "BLOCKS"), "constexpr")
    return {name: kinds.get(name, "*fp32") for name in arguments}


def test_gpu_kernels_compile_for_a_gpu() -> None:
    """Triton's compiler needs no GPU. Images are read 16 bytes at a time."""
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    from models import batchnorm_triton as kernels

    float32 = kernels.tl.float32
    tile = {"ROWS": 64, "CHANNELS": 64, "FLOAT": float32}
    finish = {"PARTS": 8, "BLOCKS": 64, "CHANNELS": 16}
    for name in ("_partial_statistics", "_finish_statistics", "_normalise", "_partial_gradients",
                 "_finish_gradients", "_input_gradient"):  # fmt: skip
        kernel = getattr(kernels, name)
        types = _types(kernel.arg_names)
        aligned = [n for n, t in enumerate(types.values()) if t.startswith("*")]
        aligned += [n for n, name in enumerate(types) if name == "C"]
        source = compiler.ASTSource(
            kernel,
            types,
            finish if "PARTS" in types else tile,
            {(n,): [["tt.divisibility", 16]] for n in aligned},
        )
        ptx = compiler.compile(source, target=backends.GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "ld.global.v4.b32" in ptx, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "num_splits"), [*SHAPES, ((64, 64, 56, 56), 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_what_the_cpu_does(
    dtype: torch.dtype, shape: tuple[int, ...], num_splits: int
) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).add(20).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for device in ("cpu", "cuda"):
        norm = SplitBatchNorm2d(shape[1], num_splits).to(device)
        leaf = images.to(device).detach().requires_grad_()
        output = norm(leaf)
        (output.float() * output.float().cos()).sum().backward()
        found.append(
            [output, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
        )
    for cpus, gpus in zip(*found, strict=True):
        left, right = cpus.detach().float(), gpus.detach().float().cpu()
        assert (left - right).abs().max() / left.abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


def test_channels_last_is_kept() -> None:
    images = _images(8).to(memory_format=torch.channels_last)
    assert SplitBatchNorm2d(5, 4)(images).is_contiguous(memory_format=torch.channels_last)
    assert shuffle_across_splits(images, 4).is_contiguous(memory_format=torch.channels_last)


def test_indivisible_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"batch of 10 .* 4 equal parts"):
        SplitBatchNorm2d(5, 4)(_images(10))
    with pytest.raises(ValueError, match="num_splits is 0"):
        SplitBatchNorm2d(5, 0)


@given(st.integers(1, 9), st.integers(1, 9))
def test_shuffle_across_splits_is_even_and_can_be_undone(num_splits: int, per_split: int) -> None:
    rows = torch.arange(num_splits * per_split)[:, None]
    shuffled = shuffle_across_splits(rows, num_splits)
    assert torch.equal(unshuffle_across_splits(shuffled, num_splits), rows)
    former = (shuffled[:, 0] // per_split).view(num_splits, per_split)
    for part in former:
        counts = torch.bincount(part, minlength=num_splits)
        assert counts.max() - counts.min() <= 1


@given(st.integers(0, 50), st.integers(1, 9))
def test_every_rank_sends_and_receives_as_many_rows_as_it_has(num_rows: int, world_size: int) -> None:
    table = [_send_sizes(num_rows, rank, world_size) for rank in range(world_size)]
    assert all(sum(row) == num_rows for row in table)
    assert all(sum(column) == num_rows for column in zip(*table, strict=True))
    assert max(map(max, table)) - min(map(min, table)) <= 1
