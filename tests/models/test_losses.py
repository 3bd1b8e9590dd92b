"""The losses against NumPy in float64 and against full logits with F.cross_entropy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import losses


def _unit(seed: int, rows: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(noise, dim=1).to(dtype)


def _info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    return losses.info_nce(q, k, losses.negative_logsumexp(q, queue, temperature)[0], temperature)


def _mixture_loss(
    qm: Tensor, k: Tensor, partner: Tensor, lam: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    lse, _ = losses.negative_logsumexp(qm, queue, temperature)
    return losses.mixture_loss(qm, k, partner, lam, lse, temperature)


def _numpy_cross_entropy(q: np.ndarray, k: np.ndarray, queue: np.ndarray, temperature: float) -> np.ndarray:
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], axis=1) / temperature
    top = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[:, 0]


def _float64(*tensors: Tensor) -> list[np.ndarray]:
    return [t.double().numpy() for t in tensors]


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("queue_len", [1, 5, 100])
def test_info_nce_against_numpy(temperature: float, queue_len: int) -> None:
    q, k, queue = _unit(0, 7), _unit(1, 7), _unit(2, queue_len)
    want = _numpy_cross_entropy(*_float64(q, k, queue), temperature).mean()
    assert _info_nce(q, k, queue, temperature).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_mixture_loss_against_numpy(temperature: float) -> None:
    qm, k, queue, lam = _unit(0, 6), _unit(1, 6), _unit(2, 50), torch.rand(6)
    partner = torch.tensor([5, 4, 3, 2, 1, 0])
    own = _numpy_cross_entropy(*_float64(qm, k, queue), temperature)
    other = _numpy_cross_entropy(*_float64(qm, k[partner], queue), temperature)
    share = lam.double().numpy()
    want = (share * own + (1 - share) * other).mean()
    assert _mixture_loss(qm, k, partner, lam, queue, temperature).item() == pytest.approx(want, rel=1e-5)


def test_mixture_with_lam_one_or_zero_is_info_nce_with_anchor_or_partner() -> None:
    qm, k, queue, partner = _unit(0, 6), _unit(1, 6), _unit(2, 50), torch.tensor([1, 2, 3, 4, 5, 0])
    whole = _mixture_loss(qm, k, partner, torch.ones(6), queue, 0.2)
    torch.testing.assert_close(whole, _info_nce(qm, k, queue, 0.2))
    none = _mixture_loss(qm, k, partner, torch.zeros(6), queue, 0.2)
    torch.testing.assert_close(none, _info_nce(qm, k[partner], queue, 0.2))


def test_gradient_is_that_of_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_rows_of_a_block", lambda device: 7)  # several blocks, the last one smaller
    k, queue, lam = _unit(1, 6), _unit(2, 50), torch.rand(6)
    partner = torch.tensor([5, 4, 3, 2, 1, 0])
    ours, naive = _unit(0, 6).requires_grad_(), _unit(0, 6).requires_grad_()
    _mixture_loss(ours, k, partner, lam, queue, 0.1).backward()

    def cross_entropy(keys: Tensor) -> Tensor:
        logits = torch.cat([(naive * keys).sum(1, keepdim=True), naive @ queue.T], dim=1) / 0.1
        return F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64), reduction="none")

    (lam * cross_entropy(k) + (1 - lam) * cross_entropy(k[partner])).mean().backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_negative_logsumexp_passes_gradcheck(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(losses, "_rows_of_a_block", lambda device: chunk)
    q = _unit(0, 3, dtype=torch.float64).requires_grad_()
    queue = _unit(2, 11, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: losses.negative_logsumexp(x, queue, 0.2)[0], (q,))


def test_negative_logsumexp_gives_the_hardest_negative() -> None:
    q, queue = _unit(0, 4), _unit(2, 30)
    lse, hardest = losses.negative_logsumexp(q, queue, 0.2)
    torch.testing.assert_close(hardest, (q @ queue.T / 0.2).amax(1))
    torch.testing.assert_close(lse, (q @ queue.T / 0.2).logsumexp(1))


def test_gradient_survives_a_queue_overwritten_before_backward() -> None:
    queue = _unit(2, 20)
    ours, untouched = _unit(0, 4).requires_grad_(), _unit(0, 4).requires_grad_()
    _info_nce(untouched, _unit(1, 4), queue.clone(), 0.2).backward()
    loss = _info_nce(ours, _unit(1, 4), queue, 0.2)
    queue.zero_()
    loss.backward()
    torch.testing.assert_close(ours.grad, untouched.grad)


def test_keys_and_queue_receive_no_gradient() -> None:
    q, k, queue = (_unit(seed, 4).requires_grad_() for seed in range(3))
    _info_nce(q, k, queue, 0.2).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None


def test_nothing_of_queue_size_is_kept_for_backward() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _info_nce(_unit(0, 8).requires_grad_(), _unit(1, 8), _unit(2, 4096), 0.2)
    assert kept and max(kept) <= 8 * 16


def test_autocast_does_not_lower_the_logits() -> None:
    q, k, queue = _unit(0, 8), _unit(1, 8), _unit(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _info_nce(q, k, queue, 0.07)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, _info_nce(q, k, queue, 0.07))
