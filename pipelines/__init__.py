"""A compiled set in, batches of views and mixtures on the training device out."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from pipelines.batch import Batch, Mixture
from pipelines.cores import usable_cores
from pipelines.engines import Engine, Reading
from pipelines.loader import ViewLoader
from pipelines.recipe import Mixing, Recipe

Backend = Literal["auto", "ffcv", "folder"]

__all__ = [
    "Backend",
    "Batch",
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
    reading: Reading = "auto",
) -> ViewLoader:
    """Build a loader over a compiled set or a folder.

    Args:
        path: a ``.beton`` file, or a folder of pictures.
        recipe: what views and mixtures look like.
        backend: ``ffcv`` for ``.beton`` files, ``folder`` for folders; ``auto`` tells by the path.
        batch_size: pictures per batch on this rank.
        seed: of every draw.
        rank: of this process.
        world_size: number of processes.
        device: where batches are wanted.
        num_threads: for decoding; 0 takes every core this process may use, shared among local ranks.
        shuffle: visit the set in a new order each epoch.
        drop_last: leave out the last, smaller batch of an epoch.
        reading: how the ffcv backend reads its file: ``map`` it and let the system keep what fits, ``read``
            each picture ahead of its turn, for sets larger than memory, or ``auto``, which goes by the sizes.

    Raises:
        FileNotFoundError: if the compiled set is not there.
        ValueError: if the path does not fit the backend, or the batch is larger than the set.
        ImportError: if a package of the backend is missing.
    """
    path = Path(path)
    if backend == "auto":
        backend = "ffcv" if path.suffix == ".beton" else "folder"
    if backend == "ffcv" and path.suffix != ".beton":
        raise ValueError(
            f"backend ffcv reads .beton files, {path} is none; convert it with `make convert DATA={path}` "
            "or choose backend folder"
        )
    if backend == "folder" and path.is_file():
        raise ValueError(f"backend folder reads folders of pictures, {path} is a file; choose backend ffcv")
    if reading not in get_args(Reading) or (backend == "folder" and reading != "auto"):
        raise ValueError(
            f"reading is {reading!r}; the ffcv backend knows {', '.join(get_args(Reading))}, the folder "
            "backend reads files ahead in any case (auto)"
        )
    num_threads = usable_cores(num_threads)
    engine: Engine
    if backend == "ffcv":
        from pipelines.ffcv_engine import FFCVEngine

        engine = FFCVEngine(path, reading)
    elif backend == "folder":
        from pipelines.folder_engine import FolderEngine

        engine = FolderEngine(path)
    else:
        raise ValueError(f"backend is {backend!r}; known are auto, ffcv, folder")
    return ViewLoader(
        engine,
        recipe,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        num_threads=num_threads,
        shuffle=shuffle,
        drop_last=drop_last,
    )


def evaluation_batches(
    path: str | Path,
    recipe: Recipe,
    backend: Backend = "auto",
    *,
    limit: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_threads: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of a set, each picture once, in order; for features, kNN and validation.

    Args:
        path: as for :func:`build_loader`.
        recipe: normally :func:`pipelines.recipe.evaluation` of a run's recipe.
        backend: as for :func:`build_loader`.
        limit: take this many pictures, drawn at random by ``seed``, instead of all.
        batch_size: pictures per batch; the last may be smaller.
        seed: of the drawing.
        device: where images are wanted.
        num_threads: for decoding; 0 takes all cores.

    Yields:
        (N, 3, S, S) float32 images and (N,) int64 labels.
    """
    loader = build_loader(
        path,
        recipe,
        backend,
        batch_size=min(batch_size, limit or batch_size),
        seed=seed,
        device=device,
        num_threads=num_threads,
        shuffle=limit is not None,
        drop_last=False,
    )
    left = loader.engine.count if limit is None else limit
    for batch in islice(loader, -(-left // loader.batch_size)):
        yield batch.query[:left], batch.label[:left]
        left -= len(batch.label)
