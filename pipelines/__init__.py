"""From a set of images to batches of views and mixtures on the training device; see :func:`build_loader`."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Batch, Mixture
from pipelines.decode.choose import Backend, choose, describe_machine, open_decoder
from pipelines.decode.dali_operators import DALIOptions
from pipelines.loader import ViewLoader
from pipelines.randomness import key_of
from pipelines.recipe import Mixing, Recipe
from pipelines.sets import PictureSet, RankShare, Reading
from pipelines.sets.stores import ShardStore, open_set
from pipelines.sets.stream import ShardStream
from pipelines.workers import DEVICE_WORKERS, LoaderConfig, usable_cores

log = logging.getLogger(__name__)

__all__ = [
    "Backend",
    "Batch",
    "DALIOptions",
    "Mixing",
    "Mixture",
    "PictureSet",
    "Reading",
    "Recipe",
    "ViewLoader",
    "build_loader",
    "evaluation_batches",
    "open_set",
]


def build_loader(
    path: str | Path,
    recipe: Recipe,
    backend: Backend = "auto",
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    num_threads: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    subset: NDArray[np.int64] | None = None,
    reading: Reading = "auto",
    dali: DALIOptions | None = None,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> ViewLoader:
    """Build a loader over a compiled set or a folder.

    With every backend, a view is a function of (seed, epoch, index, view) alone. The order of the images is a
    function of (seed, epoch), except with ``reading="stream"``; see :mod:`pipelines.sets.stream`.

    Args:
        path: a ``.beton`` file, a folder of indexed shards, or a folder of images.
        recipe: what views and mixtures look like.
        backend: the decoder. ``ffcv``, our kernels on the CPU, and ``dali`` read compiled sets; ``folder``
            reads folders of images; ``auto`` chooses, see :mod:`pipelines.decode.choose`.
        batch_size: images per batch on this rank.
        seed: of all random decisions, in [0, 2⁶⁴).
        rank: of this process.
        world_size: number of processes.
        device: the training device, on which batches are returned. On a GPU the ``dali`` backend also decodes
            and crops there.
        num_threads: threads that decode; 0 uses every core this process may use, shared among local ranks.
        shuffle: visit the set in a new order each epoch.
        drop_last: leave out the last, smaller batch of an epoch.
        subset: (n,) positions in the set, in any order. An epoch consists of these images; their views are
        the
            same as in an epoch of the whole set.
        reading: how a compiled set is read, see :data:`pipelines.sets.Reading`.
        dali: how the ``dali`` backend decodes on a GPU.
        dtype: of the views and mixtures. A run that computes in 16 bits may choose its 16-bit type, which
        halves
            the bytes.
        compiled: fuse the photometric stage and the mixing on a GPU by torch.compile, which takes some
            seconds at the first batch. The photometric stage on a CPU is always compiled.

    Returns:
        The loader. Its ``chosen`` is a line that names the chosen backend and the reason.

    Raises:
        FileNotFoundError: if the compiled set, or a file of it, is missing.
        ValueError: if the path does not fit the backend, or the batch is larger than the set.
        ImportError: if a package of the backend is missing.
    """
    path, device = Path(path), torch.device(device)
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    num_threads = usable_cores(num_threads)
    choice = choose(path, backend, describe_machine(device, num_threads))
    log.info("%s", choice)
    picture_set = open_set(path, reading)
    # A DALI graph runs for each device worker, and the graphs share the threads.
    graph_threads = max(1, num_threads // DEVICE_WORKERS)
    decoder = open_decoder(choice.backend, picture_set, device, graph_threads, dali)
    config = LoaderConfig(
        batch_size=batch_size,
        device=device,
        num_threads=num_threads,
        seed=seed,
        share=RankShare(rank, world_size),
        shuffle=shuffle,
        drop_last=drop_last,
        subset=None if subset is None else _sorted_subset(subset, picture_set.count),
        dtype=dtype,
        compiled=compiled,
    )
    stream = _open_stream(picture_set, config) if reading == "stream" else None
    loader = ViewLoader(picture_set, decoder, recipe, config, stream=stream, chosen=str(choice))
    _check(loader)
    return loader


def _sorted_subset(subset: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The subset sorted, without repetitions. Raises ValueError if it is empty or out of range."""
    if not (len(subset) and subset.min() >= 0 and subset.max() < count):
        raise ValueError(
            f"the subset has {len(subset)} images; give at least one, with positions in [0, {count})"
        )
    return np.unique(subset)


def _open_stream(picture_set: PictureSet, config: LoaderConfig) -> ShardStream:
    """Open DALI's reader of the set. Raises ValueError for options that it does not support."""
    if config.subset is not None:
        raise ValueError("a stream reads whole shards and cannot take a subset; choose reading auto")
    if not config.drop_last:
        raise ValueError("drop_last=False leaves a smaller last batch, which a stream does not have")
    assert isinstance(picture_set, ShardStore), "open_set refuses to stream other sets"
    return ShardStream(
        picture_set,
        batch_size=config.batch_size,
        seed=config.seed,
        share=config.share,
        shuffle=config.shuffle,
    )


def _check(loader: ViewLoader) -> None:
    """Raise ValueError if options are out of range or contradict each other."""
    config, world_size = loader.config, loader.config.share.world_size
    key_of(config.seed)  # raises for a seed out of range
    if not config.batch_size >= 1:
        raise ValueError(f"batch size is {config.batch_size}; it must be at least 1")
    if config.drop_last and config.batch_size * world_size > loader.count:
        raise ValueError(
            f"a batch of {config.batch_size} on {world_size} rank(s) is larger than the set of "
            f"{loader.count} images; choose a batch size of at most {loader.count // world_size}"
        )
    if not config.drop_last and (world_size > 1 or loader.recipe.mixing.method != "moco"):
        raise ValueError(
            "drop_last=False leaves a smaller last batch, which several ranks cannot share and which may be "
            "too small for mixing; use it with one rank and without mixing"
        )


def evaluation_batches(
    path: str | Path,
    recipe: Recipe,
    backend: Backend = "auto",
    *,
    limit: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    num_threads: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of a set, each image once, in order; for features, kNN and validation.

    Each rank gets consecutive batches: rank 0 the first ones, and so on. If there are too few batches, the
    last ranks get none.

    Args:
        path: as for :func:`build_loader`.
        recipe: usually :func:`pipelines.recipe.evaluation` of the recipe of a run.
        backend: as for :func:`build_loader`.
        limit: number of images to take, drawn at random by ``seed``; None for all, in order.
        batch_size: images per batch over all processes; the last may be smaller.
        seed: of the random choice of images.
        rank: of this process.
        world_size: number of processes that share the set.
        device: the device on which images are returned.
        num_threads: as for :func:`build_loader`.

    Yields:
        (N, 3, S, S) float32 images and (N,) int64 labels.
    """
    size = -(-min(batch_size, limit or batch_size) // world_size)
    loader = build_loader(
        path,
        recipe,
        backend,
        batch_size=size,
        seed=seed,
        device=device,
        num_threads=num_threads,
        shuffle=limit is not None,
        drop_last=False,
        compiled=False,  # an evaluation view is only normalised
    )
    num_images = loader.count if limit is None else limit
    num_batches = -(-num_images // size)
    per_rank = -(-num_batches // world_size)
    first, stop = (min(number * per_rank, num_batches) for number in (rank, rank + 1))
    loader.load_state_dict(loader.state_dict() | {"batches_done": first})
    for number, batch in enumerate(islice(loader, stop - first), start=first):
        left = num_images - number * size
        yield batch.query[:left], batch.label[:left]
