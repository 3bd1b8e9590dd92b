"""Our model against a plain transcription of the published one: losses, gradients, key encoder, queue."""

import functools
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.published import PlainMoCo, plain_cross_entropy, plain_objective
from models.batch import NUM_MIXTURES, Method
from models.encoders import NormLayer
from models.moco import MoCo
from pipelines import Batch, Mixture
from pipelines.augment.mixing import DrawnMixture, blend, draw_mixtures, draw_partner
from pipelines.randomness import Draw
from pipelines.recipe import Mixing, Recipe

METHODS: list[Method] = list(NUM_MIXTURES)
SIDE_PX = 16
DIM = 8
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
# BatchNorm over a handful of values may divide by a small deviation, which enlarges rounding errors.
close_after_batchnorm = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def _encoder(*, norm_layer: NormLayer) -> tuple[nn.Module, int]:
    """The smallest encoder that has batch statistics."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3, stride=2), norm_layer(6)
            self.fc: nn.Module = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(F.relu(self.bn(self.conv(images))).mean((2, 3)))

    return Tiny(), 6


def _pair(queue_ptr: int = 0, **options: object) -> tuple[MoCo, PlainMoCo]:
    """Our model and the plain one, with the same weights, queue and queue position."""
    torch.manual_seed(0)
    options = {"dim": DIM, "momentum": 0.9} | options
    ours = MoCo(_encoder, bn_splits=1, **options)
    ours.queue_ptr.fill_(queue_ptr)
    return ours, PlainMoCo(_encoder, **options).start_like(ours)


def _batch(mixing: Mixing, step: int, batch_size: int) -> Batch:
    """Views of noise, and mixtures as the loader makes them."""
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(1000, generator=generator)[:batch_size]
    query, key = torch.randn(2, batch_size, 3, SIDE_PX, SIDE_PX, generator=generator)
    recipe = Recipe(crop_px=SIDE_PX, mixing=mixing)
    drawn = draw_mixtures(recipe, Draw(1, step, index.numpy()))
    mixtures = tuple(blend(query, one) for one in drawn)
    key_mixtures = tuple(blend(key, one) for one in drawn) if mixing.symmetric else ()
    return Batch(query, key, mixtures, index, torch.full_like(index, -1), key_mixtures)


def _oldest_first(ours: MoCo) -> Tensor:
    return ours.queue_KD.roll(-int(ours.queue_ptr), dims=0)


def _assert_same_after(ours: MoCo, plain: PlainMoCo) -> None:
    """Compare weights and batch statistics of both encoders, and the queue from its oldest key on."""
    for name in ("encoder_q", "encoder_k"):
        want = plain.get_submodule(name).state_dict()
        for key, tensor in ours.get_submodule(name).state_dict().items():
            where = f"{name}.{key}"
            close_after_batchnorm(tensor, want[key], msg=lambda text, where=where: f"{where}: {text}")
    close(_oldest_first(ours), plain.queue_DK.T.roll(-plain.queue_ptr, dims=0))


def _assert_same_training(ours: MoCo, plain: PlainMoCo, batches: Sequence[Batch]) -> None:
    """Compare loss, gradients and state of every step."""
    optimizers = [torch.optim.SGD(m.encoder_q.parameters(), lr=0.1, momentum=0.9) for m in (ours, plain)]
    for batch in batches:
        losses = ours(batch)[0], plain(batch)
        close(*losses)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for p, want in zip(ours.encoder_q.parameters(), plain.encoder_q.parameters(), strict=True):
            close_after_batchnorm(p.grad, want.grad)
        for optimizer in optimizers:
            optimizer.step()
        _assert_same_after(ours, plain)


# ---------------------------------------------------------------------------------------------- the reference


def _closed_form(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> NDArray[np.float64]:
    """log Σ exp(logits) − positive logit, by NumPy in float64."""
    q64, k64, queue64 = (x.numpy().astype(np.float64) for x in (q, k, queue))
    positive = (q64 * k64).sum(1) / temperature
    negative = q64 @ queue64.T / temperature
    return np.log(np.exp(positive) + np.exp(negative).sum(1)) - positive


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_the_plain_objective_is_the_closed_form(temperature: float) -> None:
    q, k, qm, queue = F.normalize(torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(3)), dim=2)
    partner, lam = torch.arange(9).roll(2), torch.linspace(0, 1, 9)
    form = functools.partial(_closed_form, queue=queue, temperature=temperature)
    clean, own, partners = form(q, k), form(qm, k), form(qm, k[partner])
    got = plain_cross_entropy(q, k, queue.T, temperature)
    np.testing.assert_allclose(got.numpy(), clean, rtol=1e-5, atol=1e-6)
    mixture = Mixture(torch.empty(0), partner, lam)
    mixed = (lam.numpy() * own + (1 - lam.numpy()) * partners).mean()
    for method, want in (("mixmask", clean.mean() + mixed), ("erase", clean.mean() + own.mean())):
        loss = plain_objective(method, q, k, [qm], [mixture], queue.T, temperature)
        assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_plain_queue_is_a_ring_buffer(symmetric: bool) -> None:
    _, plain = _pair(queue_len=7, method="moco", symmetric=symmetric, momentum=1.0)
    want = deque(plain.queue_DK.T.clone(), maxlen=7)
    for step, batch_size in enumerate((3, 4, 7, 5, 2, 16)):
        batch = _batch(Mixing(method="moco"), step, batch_size)
        plain(batch)
        with torch.no_grad():
            for view in (batch.key, batch.query) if symmetric else (batch.key,):
                want.extend(F.normalize(plain.encoder_k(view), dim=1))
        close(plain.queue_DK.T.roll(-plain.queue_ptr, dims=0), torch.stack(list(want)))


# ------------------------------------------------------------------------------------------- ours against the
# reference


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    mask_type=st.sampled_from(["block", "grid"]),
    mask_per=st.sampled_from(["batch", "image"]),
    partner=st.sampled_from(["reverse", "random"]),
    symmetric=st.booleans(),
    batch_sizes=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    queue_len=st.integers(1, 24),
    position=st.integers(0, 23),
    temperature=st.sampled_from([0.07, 0.2]),
)
def test_any_training_is_the_plain_one(
    method: Method,
    mask_type: str,
    mask_per: str,
    partner: str,
    symmetric: bool,
    batch_sizes: list[int],
    queue_len: int,
    position: int,
    temperature: float,
) -> None:
    mixing = Mixing(
        method=method,
        mask_type=mask_type,
        mask_per=mask_per,
        partner=partner,
        symmetric=symmetric,
        grid_size=4,
    )
    ours, plain = _pair(
        position % queue_len,
        method=method,
        queue_len=queue_len,
        symmetric=symmetric,
        temperature=temperature,
    )
    batches = [_batch(mixing, step, batch_size) for step, batch_size in enumerate(batch_sizes)]
    _assert_same_training(ours, plain, batches)


@pytest.mark.parametrize("batch_size", [4, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_each_method_are_the_plain_ones(method: Method, symmetric: bool, batch_size: int) -> None:
    """Five steps that fill the queue twice; then a queue longer than a CPU's block of logits."""
    mixing = Mixing(method=method, grid_size=4, mask_per="image", symmetric=symmetric)
    ours, plain = _pair(method=method, queue_len=11, symmetric=symmetric)
    _assert_same_training(ours, plain, [_batch(mixing, step, batch_size) for step in range(5)])
    ours, plain = _pair(4998, method=method, queue_len=5000, symmetric=symmetric)
    _assert_same_training(ours, plain, [_batch(mixing, 0, batch_size)])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3, 7, 9])
def test_every_position_of_the_queue(batch_size: int, symmetric: bool) -> None:
    """Batches smaller than the queue that divide it or not, as long as the queue, and longer."""
    mixing = Mixing(method="mixmask", grid_size=4, symmetric=symmetric)
    batch = _batch(mixing, 0, batch_size)
    for position in range(7):
        ours, plain = _pair(position, method="mixmask", queue_len=7, symmetric=symmetric)
        with torch.no_grad():
            close(ours(batch)[0], plain(batch))
        _assert_same_after(ours, plain)
        if batch_size * (1 + symmetric) <= 7:
            assert int(ours.queue_ptr) == plain.queue_ptr
            close(ours.queue_KD, plain.queue_DK.T)


class _Identity(nn.Module):
    """An encoder that returns its inputs as embeddings, so that gradients by the embeddings can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.fc: nn.Module = nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("queue_len", [1, 9, 4096, 4097])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_by_the_embeddings(method: Method, queue_len: int) -> None:
    """Unequal shares, random partners, and queues of one and of two blocks of logits."""
    options = {"method": method, "queue_len": queue_len, "dim": DIM}
    ours = MoCo(lambda norm_layer: (_Identity(), DIM), bn_splits=1, **options)
    plain = PlainMoCo(lambda norm_layer: (_Identity(), DIM), **options)
    generator = torch.Generator().manual_seed(queue_len)
    rows = torch.randn(2 + NUM_MIXTURES[method], 5, DIM, generator=generator)
    partner = torch.from_numpy(draw_partner("random", Draw(0, 0, np.arange(5))))
    lam = torch.rand(5, generator=generator)
    gradients = []
    for model in (ours, plain):
        query, key, *mixed = (row.clone().requires_grad_() for row in rows)
        mixtures = tuple(Mixture(row, partner, lam) for row in mixed)
        loss = model(Batch(query, key, mixtures, partner, partner))
        (loss if isinstance(loss, Tensor) else loss[0]).backward()
        assert key.grad is None
        gradients.append([row.grad for row in (query, *mixed)])
    for got, want in zip(*gradients, strict=True):
        assert want.abs().max() > 1e-3
        close(got, want)


@settings(max_examples=15, deadline=None)
@given(batch_size=st.integers(2, 9), seed=st.integers(0, 2**16))
def test_a_blend_with_shares_of_any_size(batch_size: int, seed: int) -> None:
    """Global mixtures with one λ per image; no recipe draws such mixtures."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch_size, 3, SIDE_PX, SIDE_PX, generator=generator)
    lam = torch.rand(batch_size, generator=generator)
    row = torch.arange(batch_size)
    partner = torch.from_numpy(draw_partner("random", Draw(seed, 0, row.numpy())))
    mixture = blend(query, DrawnMixture(partner, lam, lam.view(-1, 1, 1)))
    ours, plain = _pair(method="unmix", queue_len=10)
    _assert_same_training(ours, plain, [Batch(query, key, (mixture,), row, row)] * 2)
