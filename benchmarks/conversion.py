"""Images per second of two converters on the same folder: ours, and stock FFCV's DatasetWriter.

Both run in a fresh process with as many workers. Imports and the listing of the folder are not counted.
"""

import contextlib
import io
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.programs import output_of
from benchmarks.ratios import CONVERT_FFCV, CONVERT_OURS
from benchmarks.sample_sets import read_with_pil

# Both programs print their pace as "(1,234/s)".
_PACE = re.compile(r"\(([\d,]+)/s\)")
_TIMEOUT_S = 900
CONFIGURED = {
    CONVERT_OURS: "`python -m dataset_tools convert`: JPEG bytes pass through, every image decoded once to "
    "find damaged ones, hashed and synced to disk",
    CONVERT_FFCV: "stock DatasetWriter from torchvision's ImageFolder, RGBImageField in jpg mode at its "
    "default quality of 90: every image is decoded and encoded anew",
}


def converter_rates(
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
                # FFCV's writer waits without end once one of its workers has raised.
                said = output_of(*command, timeout_s=_TIMEOUT_S)
                rates[name].append(float(_PACE.findall(said)[-1].replace(",", "")))
                out.unlink()
    return rates


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
