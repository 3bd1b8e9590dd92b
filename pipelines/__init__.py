"""A compiled set in, batches of views and mixtures on the training device out."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import Batch, Mixture
from pipelines.cores import usable_cores
from pipelines.decode.choose import Backend, choose, look_around
from pipelines.decode.dali import DALIEngine
from pipelines.decode.dali_operators import DALIOptions
from pipelines.decode.decoder import Engine, Reading
from pipelines.decode.turbo import FFCVEngine
from pipelines.loader import ViewLoader
from pipelines.recipe import Mixing, Recipe
from pipelines.sets.folder import FolderEngine
from pipelines.sets.shards import index_hint
from pipelines.sets.stores import StoreEngine, open_store
from pipelines.sets.stream import ShardStream
from pipelines.workers import WORKERS_OF_A_DEVICE

log = logging.getLogger(__name__)

__all__ = [
    "Backend",
    "Batch",
    "DALIOptions",
    "Mixing",
    "Mixture",
    "Reading",
    "Recipe",
    "ViewLoader",
    "build_loader",
    "evaluation_batches",
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

    Whatever the backend, a picture's views are a function of (seed, epoch, index, view) alone. So are the
    order and where a run resumes, except with ``reading="stream"``, whose promises stand in
    :mod:`pipelines.sets.stream`.

    Args:
        path: a ``.beton`` file, a folder of indexed shards, or a folder of pictures.
        recipe: what views and mixtures look like.
        backend: who decodes. ``ffcv``, our kernels on the CPU, and ``dali`` take compiled sets, ``folder``
            takes folders of pictures; ``auto`` chooses, see :mod:`pipelines.decode.choose`.
        batch_size: pictures per batch on this rank.
        seed: of every draw.
        rank: of this process.
        world_size: number of processes.
        device: where batches are wanted. On a GPU the ``dali`` backend decodes and crops there.
        num_threads: for decoding; 0 takes every core this process may use, shared among local ranks.
        shuffle: visit the set in a new order each epoch.
        drop_last: leave out the last, smaller batch of an epoch.
        subset: (n,) positions in the set of the pictures that an epoch goes through, instead of all, in any
            order. Their views are those they have in the whole set.
        reading: how a compiled set is read, see :data:`pipelines.decode.decoder.Reading`.
        dali: how the ``dali`` backend decodes on a GPU.
        dtype: of the views and mixtures; the compute precision of the run, so that a 16-bit run moves half
            the bytes.
        compiled: have torch.compile fuse a GPU's photometric stage and mixing, which takes some seconds at
            the first batch; False runs them operation by operation. The CPU's stage is compiled in any case.

    Raises:
        FileNotFoundError: if the compiled set, or a file of it, is not there.
        ValueError: if the path does not fit the backend, or the batch is larger than the set.
        ImportError: if a package of the backend is missing.

    Returns:
        The loader; its ``chosen`` says in a line which backend was taken, and why.
    """
    path, device = Path(path), torch.device(device)
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    num_threads = usable_cores(num_threads)
    choice = choose(path, backend, look_around(device, num_threads))
    log.info("%s", choice)
    if reading not in get_args(Reading) or (choice.backend == "folder" and reading != "auto"):
        raise ValueError(
            f"reading is {reading!r}; compiled sets know {', '.join(get_args(Reading))}, the folder backend "
            "reads files ahead in any case (auto)"
        )
    if choice.backend != "dali" and dali not in (None, DALIOptions()):
        raise ValueError(f"{dali} are given, but the backend is {choice.backend}; choose backend dali")
    engine = _open_engine(path, choice.backend, reading, device, num_threads, dali)
    stream = None
    if reading == "stream":
        if subset is not None:
            raise ValueError("a stream goes through whole shards and knows no subset; choose reading auto")
        assert isinstance(engine, StoreEngine)
        stream = ShardStream(
            engine.store, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle
        )
    return ViewLoader(
        engine,
        recipe,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
        num_threads=num_threads,
        shuffle=shuffle,
        drop_last=drop_last,
        subset=subset,
        stream=stream,
        device_engine=engine if isinstance(engine, DALIEngine) and device.type == "cuda" else None,
        dtype=dtype,
        compiled=compiled,
        chosen=str(choice),
    )


def _open_engine(
    path: Path,
    backend: Backend,
    reading: Reading,
    device: torch.device,
    num_threads: int,
    options: DALIOptions | None,
) -> Engine:
    """Open a set with the backend chosen for it."""
    if backend == "folder":
        try:
            return FolderEngine(path)
        except ValueError as error:
            if path.is_dir() and next(path.glob("*.tar"), None) is not None:
                raise ValueError(f"{path} holds tar files without an index; {index_hint(path)}") from error
            raise
    store = open_store(path, reading)
    if backend == "ffcv":
        return FFCVEngine(store)
    # On a device one graph decodes while another waits; each has its share of the threads.
    threads = max(1, num_threads // WORKERS_OF_A_DEVICE)
    return DALIEngine(store, device=device, num_threads=threads, options=options)


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
    """Images and labels of a set, each picture once, in order; for features, kNN and validation.

    Several processes take a run of batches each, the first rank the first one; the last ranks go without
    where there are too few.

    Args:
        path: as for :func:`build_loader`.
        recipe: normally :func:`pipelines.recipe.evaluation` of a run's recipe.
        backend: as for :func:`build_loader`.
        limit: take this many pictures, drawn at random by ``seed``, instead of all.
        batch_size: pictures per batch over all processes; the last may be smaller.
        seed: of the drawing.
        rank: of this process.
        world_size: number of processes that share the set.
        device: where images are wanted.
        num_threads: for decoding; 0 takes all cores.

    Yields:
        (N, 3, S, S) float32 images and (N,) int64 labels.
    """
    loader = build_loader(
        path,
        recipe,
        backend,
        batch_size=-(-min(batch_size, limit or batch_size) // world_size),
        seed=seed,
        device=device,
        num_threads=num_threads,
        shuffle=limit is not None,
        drop_last=False,
        compiled=False,  # the stage only normalises here
    )
    wanted = loader.engine.count if limit is None else limit
    batches = -(-wanted // loader.batch_size)
    most = -(-batches // world_size)
    first, stop = (min(share * most, batches) for share in (rank, rank + 1))
    loader.load_state_dict(loader.state_dict() | {"batches_done": first})
    for number, batch in enumerate(islice(loader, stop - first), start=first):
        left = wanted - number * loader.batch_size
        yield batch.query[:left], batch.label[:left]
