"""Pictures per second of two converters on the same folder: ours, and stock FFCV's DatasetWriter.

Both run in a fresh process with as many workers, and the time of their imports and of listing the folder is
not counted.
"""

import contextlib
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.ratios import CONVERT_FFCV, CONVERT_OURS
from benchmarks.sample_sets import read_with_pil

_PACE = re.compile(r"\(([\d,]+)/s\)")
# FFCV's writer waits for ever once one of its workers has raised.
_PATIENCE_S = 900
CONFIGURED = {
    CONVERT_OURS: "`python -m dataset_tools convert`: JPEG bytes pass through, every picture decoded once to "
    "find damaged ones, hashed and synced to disk",
    CONVERT_FFCV: "stock DatasetWriter from torchvision's ImageFolder, RGBImageField in jpg mode at its "
    "default quality of 90: every picture is decoded and encoded anew",
}


def measure(
    folder: Path, repeats: int, workers: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Pictures per second of both converters in each repeat, one after the other.

    The files are written beside the folder, on the same disk, and removed.
    """
    rates: dict[str, list[float]] = {CONVERT_OURS: [], CONVERT_FFCV: []}
    with tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix="conversion.") as temporary:
        for _ in range(repeats):
            for name, convert in ((CONVERT_OURS, ours), (CONVERT_FFCV, ffcv)):
                progress(f"converting: {name}")
                out = Path(temporary) / "out.beton"
                rates[name].append(convert(folder, out, workers))
                out.unlink()
    return rates


def ours(folder: Path, out: Path, workers: int) -> float:
    """Pictures per second of our converter, by its own report."""
    words = [
        "-m",
        "dataset_tools",
        "convert",
        str(folder),
        str(out),
        "--workers",
        str(workers),
        "--overwrite",
    ]
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True)
    paces = _PACE.findall(done.stdout)
    if done.returncode or not paces:
        raise ValueError(
            f"`python {' '.join(words)}` ended with code {done.returncode}: {done.stderr.strip()}"
        )
    return float(paces[-1].replace(",", ""))


def ffcv(folder: Path, out: Path, workers: int) -> float:
    """Pictures per second of stock FFCV's writer, whose worker processes are forked from a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    receiver, sender = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_ffcv, args=(folder, out, workers, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_PATIENCE_S):
            raise ValueError(
                f"FFCV's writer has not ended after {_PATIENCE_S} s; it waits for ever for a worker"
            )
        rate: float = receiver.recv()
    except EOFError as error:
        raise ValueError("FFCV's writer failed, its own words are above") from error
    finally:
        process.kill()
        process.join()
    return rate


def _ffcv(folder: Path, out: Path, workers: int, sender: Connection) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    # A spawned process would have the writer spawn its workers too, each importing everything anew; a user's
    # program on Linux forks them.
    multiprocessing.set_start_method("fork", force=True)
    pictures = ImageFolder(str(folder), loader=read_with_pil)
    image = RGBImageField(write_mode="jpg")
    # The writer draws a progress bar of its own.
    with contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        writer = DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=workers)
        writer.from_indexed_dataset(pictures)
        seconds = time.perf_counter() - start
    sender.send(len(pictures) / seconds)
