"""A single process, and two gloo processes that must behave like one with the joint batch."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from models.batch import NUM_MIXTURES, Method
from models.batchnorm import shuffle_across_ranks, unshuffle_across_ranks
from models.encoders import NormLayer
from models.moco import MoCo
from pipelines import Batch, Mixture
from tests.processes import in_two_processes
from training.distributed import Launch, _kernels_or_eager, choose_device, init_launch

PER_RANK = 6
STEPS = 3
CASES: list[tuple[Method, bool, bool]] = [
    *((method, False, False) for method in NUM_MIXTURES),
    ("both", True, False),
    ("both", False, True),
    ("mixmask", True, True),
]
"""Method, symmetric loss, joint forward."""


class _Small(nn.Module):
    """A tiny encoder, with or without BatchNorm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = norm
        self.fc: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


def _without_norm(norm_layer: NormLayer) -> tuple[nn.Module, int]:
    return _Small(nn.Identity()), 8


def _with_norm(norm_layer: NormLayer) -> tuple[nn.Module, int]:
    return _Small(norm_layer(8)), 8


def _moco(factory: Callable[..., tuple[nn.Module, int]], **options: object) -> MoCo:
    torch.manual_seed(0)
    usual = {"method": "mixmask", "dim": 8, "queue_len": 20, "momentum": 0.9, "bn_splits": 1}
    return MoCo(factory, **(usual | options))


def _batch_of(
    query: Tensor,
    key: Tensor,
    mixtures: tuple[Mixture, ...] = (),
    key_mixtures: tuple[Mixture, ...] = (),
) -> Batch:
    row = torch.arange(len(query))
    return Batch(query, key, mixtures, row, row, key_mixtures)


def _rank_batch(step: int, rank: int, num_mixtures: int = 1, symmetric: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    views = torch.randn(2, PER_RANK, 3, 8, 8, generator=generator)

    def mixtures() -> tuple[Mixture, ...]:
        return tuple(
            Mixture(
                torch.randn(PER_RANK, 3, 8, 8, generator=generator),
                torch.arange(PER_RANK).flip(0),
                torch.rand(PER_RANK, generator=generator),
            )
            for _ in range(num_mixtures)
        )

    return _batch_of(*views, mixtures(), mixtures() if symmetric else ())


def _joint_batch(step: int, num_mixtures: int = 1, symmetric: bool = False) -> Batch:
    ranks = [_rank_batch(step, rank, num_mixtures, symmetric) for rank in range(2)]

    def joined(mixtures: list[tuple[Mixture, ...]]) -> tuple[Mixture, ...]:
        return tuple(
            Mixture(
                torch.cat([one.images, two.images]),
                torch.cat([one.partner, two.partner + PER_RANK]),
                torch.cat([one.lam, two.lam]),
            )
            for one, two in zip(*mixtures, strict=True)
        )

    return _batch_of(
        torch.cat([batch.query for batch in ranks]),
        torch.cat([batch.key for batch in ranks]),
        joined([batch.mixtures for batch in ranks]),
        joined([batch.key_mixtures for batch in ranks]),
    )


def _gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The gradients of one step, under the names without DDP's prefix."""
    model(batch)[0].backward()
    plain = model.module if isinstance(model, DDP) else model
    return {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}


def _sent_bytes(step: Callable[[], object]) -> list[int]:
    """The bytes that each all-to-all and each all-gather of a step sends to the other rank."""
    sent = []
    all_to_all, all_gather = dist.all_to_all_single, dist.all_gather

    def counted_all_to_all(received: Tensor, rows: Tensor, **sizes: list[int]) -> object:
        stays = sizes["input_split_sizes"][dist.get_rank()]
        sent.append(rows[stays:].nbytes)
        return all_to_all(received, rows, **sizes)

    def counted_all_gather(received: Tensor, rows: Tensor) -> object:
        sent.append(rows.nbytes)
        return all_gather(received, rows)

    with (
        patch.object(dist, "all_to_all_single", counted_all_to_all),
        patch.object(dist, "all_gather", counted_all_gather),
    ):
        step()
    return sent


def _train(model: nn.Module, batches: list[Batch]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    seen = []
    for batch in batches:
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _worker(folder: Path) -> None:
    """Everything that the two ranks do in these tests, so that they are started once."""
    seen: dict[str, object] = {}
    with init_launch("cpu") as launch:
        rank = launch.rank
        seen["launch"] = [
            launch.rank,
            launch.world_size,
            launch.is_main,
            str(launch.device),
            dist.get_backend(),
        ]
        for rows in (1, 5, 6):
            images = torch.arange(rows * 12.0).view(rows, 3, 2, 2) + 1000 * rank
            dealt = shuffle_across_ranks(images.to(memory_format=torch.channels_last))
            seen[f"dealt_{rows}"] = dealt
            seen[f"back_{rows}"] = torch.equal(unshuffle_across_ranks(dealt), images)

        moco = _moco(_without_norm)
        seen["losses"] = _train(DDP(moco), [_rank_batch(step, rank) for step in range(STEPS)])
        seen["model"] = _plain(moco)

        with_norm = _moco(_with_norm)
        _train(DDP(with_norm), [_rank_batch(step, rank) for step in range(STEPS)])
        seen["queue_with_norm"] = with_norm.queue_KD.clone()

        split = _moco(_with_norm, bn_splits=3)
        reference = _moco(_with_norm, bn_splits=1).encoder_k.eval()
        split.encoder_k.eval()
        key = _rank_batch(0, rank).key
        keys = split._embed_keys(key)
        want = torch.nn.functional.normalize(reference(key), dim=1)
        seen["rows_stay"] = torch.allclose(keys, want, atol=1e-6)

        for number, (method, symmetric, joint) in enumerate(CASES):
            one_step = _moco(_without_norm, method=method, symmetric=symmetric, joint_forward=joint)
            batch = _rank_batch(0, rank, NUM_MIXTURES[method], symmetric)
            seen[f"gradients_{number}"] = _gradients(DDP(one_step), batch)
            seen[f"queue_{number}"] = one_step.queue_KD

        counted = DDP(_moco(_without_norm))
        seen["sent"] = _sent_bytes(lambda: counted(_rank_batch(0, rank)))

        # Three rows from one rank and none from the other; the reverse; rows from both.
        for number, rows in enumerate(((3, 0), (0, 2), (2, 5))):
            gathered = launch.gather_rows(torch.full((rows[rank], 2), float(rank)))
            seen[f"gathered_{number}"] = gathered

        own_queue = _moco(_without_norm, queue_seed=rank)
        DDP(own_queue)(_rank_batch(0, rank))
        seen["own_queue"] = own_queue.queue_KD.clone()
        launch.barrier()
    seen["left"] = not dist.is_initialized()
    torch.save(seen, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(_worker, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_ranks_know_their_rank_and_leave_the_group(ranks: list[dict[str, object]]) -> None:
    for rank in range(2):
        assert ranks[rank]["launch"] == [rank, 2, rank == 0, "cpu", "gloo"]
        assert ranks[rank]["left"]


@pytest.mark.parametrize("rows", [1, 5, 6])
def test_shuffle_is_undone_and_mixes_the_ranks_evenly(ranks: list[dict[str, object]], rows: int) -> None:
    dealt = [ranks[rank][f"dealt_{rows}"] for rank in range(2)]
    assert all(ranks[rank][f"back_{rows}"] for rank in range(2))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in dealt)
    for images in dealt:
        from_other = int((images[:, 0, 0, 0] >= 1000).sum())
        assert abs(from_other - rows / 2) <= 0.5
    everything = torch.cat(dealt)[:, 0, 0, 0].sort().values
    own = torch.arange(rows) * 12.0
    assert torch.equal(everything, torch.cat([own, own + 1000]))


def test_two_ranks_without_batchnorm_train_like_one_with_the_joint_batch(
    ranks: list[dict[str, object]],
) -> None:
    moco = _moco(_without_norm)
    joint_losses = _train(moco, [_joint_batch(step) for step in range(STEPS)])
    mean_losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(joint_losses), rtol=1e-5, atol=1e-6)
    for rank in ranks:
        torch.testing.assert_close(rank["model"], _plain(moco), rtol=1e-4, atol=1e-5)
    assert not torch.equal(moco.encoder_q.conv.weight, _moco(_without_norm).encoder_q.conv.weight)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_gradients_are_those_of_one_process_with_the_joint_batch(
    ranks: list[dict[str, object]], number: int
) -> None:
    method, symmetric, joint = CASES[number]
    moco = _moco(_without_norm, method=method, symmetric=symmetric, joint_forward=joint)
    want = _gradients(moco, _joint_batch(0, NUM_MIXTURES[method], symmetric))
    assert all(gradient.abs().max() > 1e-4 for gradient in want.values())
    for rank in ranks:
        torch.testing.assert_close(rank[f"gradients_{number}"], want, rtol=1e-4, atol=1e-6)
    queues = [rank[f"queue_{number}"] for rank in ranks]
    assert torch.equal(*queues)
    # A symmetric loss has two keys per image, which arrive rank by rank instead of view by view.
    first_column = [queue[:, 0].sort().values for queue in (queues[0], moco.queue_KD)]
    torch.testing.assert_close(*first_column, rtol=1e-4, atol=1e-6)


def test_only_necessary_rows_are_sent(ranks: list[dict[str, object]]) -> None:
    """Half of the key images and, on the way back, of the keys; then all keys for the queue."""
    image, key = 3 * 8 * 8 * 4, 8 * 4
    for rank in ranks:
        assert rank["sent"] == [PER_RANK // 2 * image, PER_RANK // 2 * key, PER_RANK * key]


def test_queues_are_the_same_bits_on_both_ranks(ranks: list[dict[str, object]]) -> None:
    assert torch.equal(ranks[0]["queue_with_norm"], ranks[1]["queue_with_norm"])
    assert torch.equal(ranks[0]["model"]["queue_KD"], ranks[1]["model"]["queue_KD"])


def test_keys_return_to_their_queries_through_ranks_and_splits(ranks: list[dict[str, object]]) -> None:
    """In eval mode BatchNorm has no batch statistics, so shuffled keys must equal unshuffled ones."""
    assert ranks[0]["rows_stay"] and ranks[1]["rows_stay"]


def test_ddp_does_not_broadcast_the_queue(ranks: list[dict[str, object]]) -> None:
    """Each rank has its own initial noise here; beyond the new keys it must be unchanged."""
    for rank in range(2):
        noise = _moco(_without_norm, queue_seed=rank).queue_KD[2 * PER_RANK :]
        assert torch.equal(ranks[rank]["own_queue"][2 * PER_RANK :], noise)


def test_a_single_process_has_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with init_launch("cpu") as launch:
        assert (launch.rank, launch.world_size, launch.local_rank, launch.is_main) == (0, 1, 0, True)
        assert not dist.is_initialized()
        launch.barrier()


def test_unavailable_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device is 'tpu'; choose auto, cpu or cuda"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda', but PyTorch sees no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="local rank 2 has no GPU of its own, this machine has 2"):
        choose_device("cuda", 2)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two'"), init_launch("cpu"):
        pass


def test_rows_are_gathered_on_the_main_process(ranks: list[dict[str, object]]) -> None:
    for number, (first, second) in enumerate(((3, 0), (0, 2), (2, 5))):
        gathered = ranks[0][f"gathered_{number}"]
        assert isinstance(gathered, Tensor) and gathered.shape == (first + second, 2)
        assert gathered[:, 0].tolist() == [0.0] * first + [1.0] * second
        assert ranks[1][f"gathered_{number}"] is None


def test_without_a_kernel_compiler_there_is_a_warning_and_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traced = []

    def backend(module: torch.fx.GraphModule, _: object) -> object:
        traced.append(module)
        return module.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    launched = Launch(0, 1, 0, torch.device("cuda", 0))
    monkeypatch.setattr(
        "training.distributed.missing_for_kernels", lambda: "there is no C compiler (gcc): get one"
    )
    with _kernels_or_eager(launched):
        assert double(torch.ones(2)).tolist() == [2, 2] and not traced
    said = capsys.readouterr().err
    assert "cannot be compiled here: there is no C compiler (gcc): get one. This makes" in said
    monkeypatch.setattr("training.distributed.missing_for_kernels", lambda: "")
    with _kernels_or_eager(launched):
        assert double(torch.ones(2)).tolist() == [2, 2] and len(traced) == 1
    assert not capsys.readouterr().err
