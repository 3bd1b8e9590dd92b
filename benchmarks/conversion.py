"""Images per second of two converters on the same folder: ours, and stock FFCV's DatasetWriter.

Both run in a fresh process with as many workers. Imports and the listing of the folder are not counted.
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
from pathlib import Path

from benchmarks.ratios import CONVERT_FFCV, CONVERT_OURS
from benchmarks.sample_sets import read_with_pil

_PACE = re.compile(r"\(([\d,]+)/s\)")
_TIMEOUT_S = 900
CONFIGURED = {
    CONVERT_OURS: "`python -m dataset_tools convert`: JPEG bytes pass through, every image decoded once to "
    "find damaged ones, hashed and synced to disk",
    CONVERT_FFCV: "stock DatasetWriter from torchvision's ImageFolder, RGBImageField in jpg mode at its "
    "default quality of 90: every image is decoded and encoded anew",
}


def measure(
    folder: Path, repeats: int, workers: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Measure both converters in turn, with output on the disk of the folder."""
    rates: dict[str, list[float]] = {CONVERT_OURS: [], CONVERT_FFCV: []}
    with tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix="conversion.") as temporary:
        out = Path(temporary) / "out.beton"
        ours = ("-m", "dataset_tools", "convert", folder, out, "--workers", workers, "--overwrite")
        ffcv = ("-c", "from benchmarks.conversion import ffcv; ffcv()", folder, out, workers)
        for _ in range(repeats):
            for name, command in ((CONVERT_OURS, ours), (CONVERT_FFCV, ffcv)):
                progress(f"converting: {name}")
                rates[name].append(_images_per_s(*command))
                out.unlink()
    return rates


def _images_per_s(*words: object) -> float:
    """Run a program that reports its pace as "(1,234/s)"."""
    command = [sys.executable, *map(str, words)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        # FFCV's writer waits without end once one of its workers has raised.
        raise ValueError(f"`python {' '.join(command[1:])}` has not ended after {_TIMEOUT_S} s") from error
    paces = _PACE.findall(done.stdout)
    if done.returncode or not paces:
        raise ValueError(
            f"`python {' '.join(command[1:])}` ended with code {done.returncode}: {done.stderr.strip()}"
        )
    return float(paces[-1].replace(",", ""))


def ffcv() -> None:
    """Write a set with stock FFCV: the whole program, with folder, file and workers as its arguments."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    folder, out, workers = sys.argv[1:]
    # The writer's workers are forked, as in a user's program on Linux, and need not import everything anew.
    multiprocessing.set_start_method("fork", force=True)
    images = ImageFolder(folder, loader=read_with_pil)
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    with contextlib.redirect_stderr(io.StringIO()):  # the writer draws a progress bar
        start = time.perf_counter()
        DatasetWriter(out, fields, num_workers=int(workers)).from_indexed_dataset(images)
        seconds = time.perf_counter() - start
    sys.stdout.write(f"({len(images) / seconds:,.0f}/s)\n")
