"""MoCo: the queue against a deque, the key encoder against its closed form, the loss against its terms."""

import copy
from collections import deque
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.batch import NUM_MIXTURES, Method
from models.batchnorm import join_branches, separate_branches
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Batch, Mixture


def _batch_of(
    query: Tensor,
    key: Tensor,
    mixtures: tuple[Mixture, ...] = (),
    key_mixtures: tuple[Mixture, ...] = (),
) -> Batch:
    row = torch.arange(len(query))
    return Batch(query, key, mixtures, row, row, key_mixtures)


def _images(seed: int, batch_size: int) -> Tensor:
    noise = torch.randn(batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise.to(memory_format=torch.channels_last)


def _batch(seed: int = 0, batch_size: int = 8, num_mixtures: int = 0, symmetric: bool = False) -> Batch:
    partner = torch.arange(batch_size).roll(1)
    lam = torch.linspace(0.1, 0.9, batch_size)
    both = [
        tuple(Mixture(_images(seed + first + i, batch_size), partner, lam) for i in range(num_mixtures))
        for first in (10, 20)
    ]
    views = _images(seed, batch_size), _images(seed + 1, batch_size)
    return _batch_of(*views, both[0], both[1] if symmetric else ())


def _moco(**options: object) -> MoCo:
    torch.manual_seed(0)
    options = {"queue_len": 32, "dim": 16, "bn_splits": 2} | options
    return MoCo(partial(build_encoder, "resnet10w16"), **options)


class _Row(nn.Module):
    """An encoder that returns the first pixels of its input, so that keys are known."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(()))
        self.fc: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.dim] * self.scale


def _queue_only(queue_len: int) -> MoCo:
    moco = MoCo(lambda norm_layer: (_Row(4), 4), dim=4, queue_len=queue_len, bn_splits=1)
    for encoder in (moco.encoder_q, moco.encoder_k):
        encoder.fc = nn.Identity()
    return moco


def _oldest_first(moco: MoCo) -> Tensor:
    return moco.queue_KD.roll(-int(moco.queue_ptr), dims=0)


@pytest.mark.parametrize("queue_len", [1, 7, 8, 9, 100])
def test_queue_around_the_batch_size(queue_len: int) -> None:
    moco, want = _queue_only(queue_len), deque(maxlen=queue_len)
    want.extend(moco.queue_KD.clone())
    for step in range(5):
        batch = _batch(step, 8)
        moco(batch)
        want.extend(F.normalize(batch.key.flatten(1)[:, :4], dim=1))
        torch.testing.assert_close(_oldest_first(moco), torch.stack(list(want)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 25), max_size=6))
def test_queue_is_a_deque_for_any_sizes(queue_len: int, batch_sizes: list[int]) -> None:
    moco, want = _queue_only(queue_len), deque(maxlen=queue_len)
    want.extend(moco.queue_KD.clone())
    for step, batch_size in enumerate(batch_sizes):
        keys = F.normalize(torch.randn(batch_size, 4, generator=torch.Generator().manual_seed(step)), dim=1)
        moco._enqueue(keys)
        want.extend(keys)
    assert torch.equal(_oldest_first(moco), torch.stack(list(want)))


def test_queue_starts_as_unit_noise_of_its_seed() -> None:
    first, again, other = _moco(), _moco(), _moco(queue_seed=1)
    torch.testing.assert_close(first.queue_KD.norm(dim=1), torch.ones(32))
    assert torch.equal(first.queue_KD, again.queue_KD)
    assert not torch.equal(first.queue_KD, other.queue_KD)


def test_encoders_start_equal_and_share_no_memory() -> None:
    moco = _moco()
    theirs = moco.encoder_k.state_dict()
    for name, tensor in moco.encoder_q.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.data_ptr() != theirs[name].data_ptr(), name


def test_key_encoder_moves_by_momentum_alone() -> None:
    moco = _moco(momentum=0.9, method="mixmask")
    optimizer = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], lr=0.1)
    expected = {name: p.detach().clone() for name, p in moco.encoder_k.named_parameters()}
    for step in range(3):
        for name, p in moco.encoder_q.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
        loss, _ = moco(_batch(step, num_mixtures=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in moco.encoder_k.named_parameters():
        assert p.grad is None and not p.requires_grad
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)
    assert all(p.grad is not None for p in moco.encoder_q.parameters())
    pairs = zip(moco.encoder_k.parameters(), moco.encoder_q.parameters(), strict=True)
    moved = [p.sub(q).abs().max() for p, q in pairs]
    assert max(moved) > 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", list(NUM_MIXTURES))
def test_loss_is_the_sum_of_its_terms(method: Method, symmetric: bool) -> None:
    moco = _moco(method=method, symmetric=symmetric).eval()
    batch = _batch(num_mixtures=NUM_MIXTURES[method], symmetric=symmetric)
    loss, metrics = moco(batch)
    directions = [(batch.query, batch.key, batch.mixtures)]
    if symmetric:
        directions.append((batch.key, batch.query, batch.key_mixtures))
    clean, mixed, queries = [], [], []
    for query, key, mixtures in directions:
        k = F.normalize(moco.encoder_k(key), dim=1)
        q = F.normalize(moco.encoder_q(query), dim=1)
        queries.append(torch.cat([(q * k).sum(1, keepdim=True), q @ moco.queue_KD.T], 1))
        clean.append(_cross_entropy(q, k, moco.queue_KD).mean())
        for mixture in mixtures:
            qm = F.normalize(moco.encoder_q(mixture.images), dim=1)
            term = _cross_entropy(qm, k, moco.queue_KD)
            if method != "erase":
                partners = _cross_entropy(qm, k[mixture.partner], moco.queue_KD)
                term = mixture.lam * term + (1 - mixture.lam) * partners
            mixed.append(term.mean())
    torch.testing.assert_close(metrics["loss_clean"], sum(clean).detach())
    torch.testing.assert_close(loss, sum(clean + mixed))
    logits = torch.cat(queries)
    torch.testing.assert_close(metrics["acc1"], (logits.argmax(1) == 0).float().mean())
    torch.testing.assert_close(metrics["pos_sim"], logits[:, 0].mean().detach())
    torch.testing.assert_close(metrics["neg_sim"], logits[:, 1:].mean().detach(), rtol=1e-4, atol=1e-6)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert ("loss_mix" in metrics) == (method != "moco")


def _cross_entropy(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")


def test_symmetric_loss_puts_both_views_keys_into_the_queue() -> None:
    moco = _moco(method="mixmask", symmetric=True)
    moco(_batch(num_mixtures=1, symmetric=True))
    assert int(moco.queue_ptr) == 16


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bn_splits", [1, 2])
def test_a_joint_forward_differs_only_in_its_batch_statistics(bn_splits: int, symmetric: bool) -> None:
    options = {"method": "both", "bn_splits": bn_splits, "symmetric": symmetric}
    apart, joint = _moco(**options), _moco(**options, joint_forward=True)
    batch = _batch(num_mixtures=2, symmetric=symmetric)
    torch.testing.assert_close(apart.eval()(batch)[0], joint.eval()(batch)[0])
    assert not torch.allclose(apart.train()(batch)[0], joint.train()(batch)[0])


def test_a_joint_forward_gives_every_split_rows_of_every_branch() -> None:
    branches = [_images(seed, 8) for seed in range(3)]
    joint = join_branches(branches, 2)
    assert joint.is_contiguous(memory_format=torch.channels_last)
    for part, half in zip(joint.chunk(2), (slice(0, 4), slice(4, 8)), strict=True):
        assert torch.equal(part, torch.cat([images[half] for images in branches]))
    for back, images in zip(separate_branches(joint.flatten(1), 3, 2), branches, strict=True):
        assert torch.equal(back, images.flatten(1))


def test_the_whole_forward_is_one_graph() -> None:
    """Nothing in the forward pass depends on a value that is only on the device."""
    moco = _moco(method="both", symmetric=True)
    traced = copy.deepcopy(moco)
    traced.compile(backend="eager", fullgraph=True)
    for step in range(2):
        batch = _batch(step, num_mixtures=2, symmetric=True)
        # On some processors a sum's last bit depends on the memory alignment of its terms.
        torch.testing.assert_close(traced(batch), moco(batch))
    torch.testing.assert_close(traced.state_dict(), moco.state_dict())


def test_identical_views_at_the_start_give_similarity_one() -> None:
    """Query and key encoder are equal, so without batch statistics the pair must coincide."""
    moco = _moco().eval()
    images = _images(0, 8)
    _, metrics = moco(_batch_of(images, images))
    assert metrics["pos_sim"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["acc1"] == 1


def test_keys_keep_their_rows_but_share_statistics_with_other_images() -> None:
    """With BN over 4 parts, keys are those that the key encoder gives for the shuffled batch."""
    moco = _moco(bn_splits=4, momentum=1.0)
    reference = copy.deepcopy(moco.encoder_k)
    images = _images(0, 8)
    keys = moco._embed_keys(images)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    with torch.no_grad():
        shuffled = F.normalize(reference(images[order]), dim=1)
    torch.testing.assert_close(keys[order], shuffled)


def test_eval_leaves_the_state_alone() -> None:
    moco = _moco().eval()
    before = copy.deepcopy(moco.state_dict())
    moco(_batch())
    for name, tensor in moco.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_state_dict_round_trip_gives_the_same_next_steps() -> None:
    moco = _moco()
    moco(_batch(0))
    other = _moco(queue_seed=5)
    other.load_state_dict(moco.state_dict())
    for step in (1, 2):
        torch.testing.assert_close(moco(_batch(step))[0], other(_batch(step))[0])


def test_heads_of_v1_and_v2() -> None:
    assert [name for name in _moco(mlp=False).encoder_q.state_dict() if "fc" in name] == [
        "fc.weight",
        "fc.bias",
    ]
    v2 = _moco().encoder_q.get_submodule("fc")
    assert [type(layer) for layer in v2.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert _moco().backbone_features(_images(0, 4)).shape == (4, 128)


def test_feature_std_is_one_when_even_and_zero_when_collapsed() -> None:
    moco = _moco()
    even = F.normalize(torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    score = partial(moco._contrast_metrics, k_ND=even, hardest_N=torch.zeros(4096))
    assert score(even)["feature_std"].item() == pytest.approx(1, abs=0.02)
    assert score(even[:1].expand(4096, -1))["feature_std"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_len": 0}, "queue_len is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"bn_splits": 0}, "bn_splits is 0"),
        ({"method": "mscn"}, "method is 'mscn'"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _moco(**options)


def test_a_batch_without_its_mixtures_is_refused() -> None:
    with pytest.raises(ValueError, match="'both' needs 2 mixtures of the query views, the batch has 1"):
        _moco(method="both")(_batch(num_mixtures=1))
    with pytest.raises(ValueError, match="'unmix' needs 1 mixtures of the key views, the batch has 0"):
        _moco(method="unmix", symmetric=True)(_batch(num_mixtures=1))
    with pytest.raises(ValueError, match="8 query and 0 key views"):
        _moco()(_batch_of(_images(0, 8), _images(0, 0)))
