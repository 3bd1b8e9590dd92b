"""Files in random order without end, for peers whose libraries leave the order to their user."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from pipelines.sets.folder import FolderListing


def shuffled_batches(folder: Path, batch_size: int) -> Iterator[list[Path]]:
    """Batches of the pictures of a folder, each picture once before any comes again."""
    listing = FolderListing(folder)
    files = [folder / listing.path(i) for i in range(len(listing))]

    def endless() -> Iterator[Path]:
        while True:
            for index in torch.randperm(len(files)).tolist():
                yield files[index]

    source = endless()
    while True:
        yield list(islice(source, batch_size))
