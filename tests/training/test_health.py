"""Effective rank against closed forms and NumPy, the queue's age against a deque."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.health import effective_rank, queue_health


def test_orthogonal_directions_used_alike_have_full_rank() -> None:
    assert effective_rank(torch.eye(16) * 3) == pytest.approx(16)
    assert effective_rank(torch.eye(16)[:5]) == pytest.approx(5, rel=1e-4)


def test_one_vector_has_rank_one() -> None:
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)


def test_effective_rank_is_that_of_the_singular_values() -> None:
    features = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 13)
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-8)


def test_features_without_content_are_refused() -> None:
    for features in (torch.zeros(4, 3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="have no rank"):
            effective_rank(features)


@given(st.integers(0, 30), st.integers(1, 20), st.integers(1, 50))
def test_the_queue_is_as_old_as_its_oldest_key(steps: int, keys_per_step: int, queue_len: int) -> None:
    queue: deque[int] = deque(maxlen=queue_len)
    for step in range(steps):
        queue.extend([step] * keys_per_step)
    health = queue_health(steps, keys_per_step, queue_len)
    assert health["queue_filled"] == pytest.approx(len(queue) / queue_len)
    assert health["queue_age"] == (steps - 1 - queue[0] if queue else 0)
