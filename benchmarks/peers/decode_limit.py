"""The limit of a loader that decodes whole JPEG pictures: libjpeg-turbo decoding each once, nothing else."""

from collections.abc import Iterator
from itertools import cycle

import simplejpeg

from benchmarks.peers.contract import DECODE_LIMIT, Job, Peer, Work
from pipelines.sets.folder import FolderListing


def open_decode(job: Job) -> Iterator[object]:
    """Decode the pictures one after the other on this thread, bytes and pixels in memory from the start."""
    listing = FolderListing(job.folder)
    encoded = [(job.folder / listing.path(i)).read_bytes() for i in range(len(listing))]
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in encoded]
    pixels = bytearray(3 * max(height * width for height, width in sizes))
    source = cycle(encoded)
    while True:
        for _ in range(job.batch_size):
            simplejpeg.decode_jpeg(next(source), "RGB", buffer=pixels)
        yield None


_NO_CROPS = "it decodes and makes no views"
PEERS = [
    Peer(
        DECODE_LIMIT,
        crops=Work(
            open_decode,
            "simplejpeg.decode_jpeg to RGB, each picture once on one thread, bytes in memory; the rate "
            "counts times the threads",
            one_thread=True,
        ),
        recipe=_NO_CROPS,
        fixed_crops=_NO_CROPS,
        antialiased=None,
    )
]
