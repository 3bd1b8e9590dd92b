"""SplitBatchNorm2d against one BatchNorm per part; the deals against their inverses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.batchnorm import (
    SplitBatchNorm2d,
    _hand_sizes,
    _normalise_parts,
    _NormaliseParts,
    deal_over_splits,
    undeal_over_splits,
)


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
    split, plain = SplitBatchNorm2d(5, 2), nn.BatchNorm2d(5)
    ours, reference = _images(6).requires_grad_(), _images(6).requires_grad_()
    split(ours).square().mul(_images(6, 1)).sum().backward()
    torch.cat([plain(chunk) for chunk in reference.chunk(2)]).square().mul(_images(6, 1)).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad)
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_written_in_place_are_the_parts_joined(dtype: torch.dtype) -> None:
    weight, bias = torch.rand(2, 5)
    images = _images(12).to(dtype).to(memory_format=torch.channels_last)
    ways = []
    for normalise in (_normalise_parts, _NormaliseParts.apply):
        leaf, scale, shift = (x.clone().requires_grad_() for x in (images, weight, bias))
        means, variances = torch.zeros(3, 5), torch.ones(3, 5)
        output = normalise(leaf, scale, shift, means, variances, 0.1, 1e-5)
        (output.float() * _images(12, 1)).sum().backward()
        assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)
        ways.append([output.detach(), leaf.grad, scale.grad, shift.grad, means, variances])
    torch.testing.assert_close(*ways, rtol=1e-5, atol=1e-4)


def test_channels_last_stays() -> None:
    images = _images(8).to(memory_format=torch.channels_last)
    assert SplitBatchNorm2d(5, 4)(images).is_contiguous(memory_format=torch.channels_last)
    assert deal_over_splits(images, 4).is_contiguous(memory_format=torch.channels_last)


def test_indivisible_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"batch of 10 .* 4 equal parts"):
        SplitBatchNorm2d(5, 4)(_images(10))
    with pytest.raises(ValueError, match="num_splits is 0"):
        SplitBatchNorm2d(5, 0)


@given(st.integers(1, 9), st.integers(1, 9))
def test_deal_over_splits_is_undone_and_even(num_splits: int, per_split: int) -> None:
    rows = torch.arange(num_splits * per_split)[:, None]
    dealt = deal_over_splits(rows, num_splits)
    assert torch.equal(undeal_over_splits(dealt, num_splits), rows)
    former = (dealt[:, 0] // per_split).view(num_splits, per_split)
    for part in former:
        counts = torch.bincount(part, minlength=num_splits)
        assert counts.max() - counts.min() <= 1


@given(st.integers(0, 50), st.integers(1, 9))
def test_every_rank_hands_out_and_receives_as_many_rows_as_it_has(num_rows: int, world_size: int) -> None:
    table = [_hand_sizes(num_rows, rank, world_size) for rank in range(world_size)]
    assert all(sum(row) == num_rows for row in table)
    assert all(sum(column) == num_rows for column in zip(*table, strict=True))
    assert max(map(max, table)) - min(map(min, table)) <= 1
