"""The limit of a loader that decodes whole JPEG images: libjpeg-turbo decodes each once, nothing else."""

from collections.abc import Iterator
from itertools import cycle, islice

import simplejpeg

from benchmarks.peers.contract import DECODE_LIMIT, Job, Peer, PeerWork, image_files


def _decode(job: Job) -> Iterator[object]:
    """Decode one image after the other on this thread, with bytes and pixels in memory from the start."""
    encoded = [file.read_bytes() for file in image_files(job.folder)]
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in encoded]
    pixels = bytearray(3 * max(height * width for height, width in sizes))
    source = cycle(encoded)
    while True:
        for data in islice(source, job.batch_size):
            simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
        yield None


_NO_CROPS = "it only decodes and makes no views"
_SETUP = (
    "simplejpeg.decode_jpeg to RGB, each image once on one thread, bytes in memory; the rate is multiplied "
    "by the number of threads"
)
_WORK = PeerWork(_decode, _SETUP, one_thread=True)
PEERS = [Peer(DECODE_LIMIT, _WORK, _NO_CROPS, _NO_CROPS, antialiased=None)]
