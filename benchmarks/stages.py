"""Our loader's stages on one thread each, ways to the photometric one, and the two converters.

Shape letters: N views, S side in pixels, P parameters.
"""

import contextlib
import io
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.programs import output_of
from benchmarks.ratios import COMPILED, CONVERT_FFCV, CONVERT_OURS, EAGER, FUSED
from benchmarks.sample_sets import read_with_pil
from benchmarks.timing import Runner
from pipelines import PictureSet, open_set
from pipelines.augment.draws import draw_boxes, draw_parameters
from pipelines.augment.photometric import augment
from pipelines.augment.photometric_cpu import augment_on_cpu
from pipelines.decode.turbo import TurboDecoder
from pipelines.randomness import Draw
from pipelines.recipe import Recipe

_REPEATS = 7
_AT_ONCE = 16
"""Images per call, about as many as a worker of the loader takes."""
PHOTOMETRIC = {
    FUSED: "pipelines.augment.photometric_cpu: one view at a time; what is not drawn costs nothing",
    COMPILED: "torch.compile(pipelines.augment.photometric.augment, fullgraph=True) on the whole batch",
    EAGER: "pipelines.augment.photometric.augment on the whole batch",
}
"""Way → how it is configured."""
CONVERTERS = {
    CONVERT_OURS: "`python -m dataset_tools convert`: JPEG bytes pass through, every image decoded once to "
    "find damaged ones, hashed and synced to disk",
    CONVERT_FFCV: "stock DatasetWriter from torchvision's ImageFolder, RGBImageField in jpg mode at its "
    "default quality of 90: every image is decoded and encoded anew",
}
"""Converter → how it is configured."""
# Both programs print their pace as "(1,234/s)".
_PACE = re.compile(r"\(([\d,]+)/s\)")
_TIMEOUT_S = 900


def stage_times(path: Path, recipe: Recipe, num: int) -> dict[str, float]:
    """Time the stages on ``num`` images of a ``.beton`` set, its pages in memory.

    Each stage runs by itself over the same images, round-robin. A stage that cannot be run alone is the
    difference of two runs, with it and without it.

    Returns:
        Stage → median microseconds per image, all its views together.
    """
    images = open_set(path, "map")
    indices = np.arange(num).reshape(-1, _AT_ONCE) % images.count
    tasks = _tasks(images, recipe)
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(_REPEATS + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            for index in indices:
                task(index)
            times[name].append((time.perf_counter() - started) / num * 1e6)
    # The first round compiles and warms up.
    whole = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "drawing": whole["drawing"],
        "decoding": whole["decoding"],
        "cropping": whole["crops"] - whole["decoding"] - whole["drawing"] / 2,
        "jitter and grey": whole["without blur"] - whole["normalising"],
        "blur": whole["photometric"] - whole["without blur"],
        "normalising": whole["normalising"],
    }


def _tasks(images: PictureSet, recipe: Recipe) -> dict[str, Callable[[NDArray[np.int64]], object]]:
    """Return what is timed, each a function of the indices of some images."""
    decoder, side = TurboDecoder(), recipe.crop_px
    views = np.zeros((_AT_ONCE, recipe.num_views, side, side, 3), np.uint8)
    floats = np.zeros((recipe.num_views, _AT_ONCE, side, side, 3), np.float32)
    no_boxes = np.zeros((_AT_ONCE, 0, 5), np.int32)

    def crop(index: NDArray[np.int64]) -> None:
        encoded = images.fetch(index)
        decoder.crop(encoded, draw_boxes(recipe, Draw(0, 0, index), encoded.size_N2), views)

    def draw(index: NDArray[np.int64]) -> None:
        draw_boxes(recipe, Draw(0, 0, index), images.fetch(index).size_N2)
        draw_parameters(recipe, Draw(0, 0, index))

    def augmented(by: Recipe) -> Callable[[NDArray[np.int64]], None]:
        return lambda index: augment_on_cpu(views, draw_parameters(by, Draw(0, 0, index)), by, floats)

    sharp = replace(recipe, blur_prob=0.0)
    return {
        "drawing": draw,
        "decoding": lambda index: decoder.crop(images.fetch(index), no_boxes, views[:, :0]),
        "crops": crop,
        "photometric": augmented(recipe),
        "without blur": augmented(sharp),
        "normalising": augmented(replace(sharp, jitter_prob=0.0, grey_prob=0.0, solarize_prob=0.0)),
    }


def photometric(views_NSS3: NDArray[np.uint8], recipe: Recipe, num_threads: int) -> dict[str, Runner]:
    """Return the three ways to the photometric stage over the same (N, S, S, 3) crops."""
    params_VNP = draw_parameters(recipe, Draw(0, 0, np.arange(len(views_NSS3))))
    on_torch = torch.from_numpy(views_NSS3), torch.from_numpy(params_VNP[0]), recipe
    compiled = torch.compile(augment, fullgraph=True)
    ways = {
        FUSED: partial(_fused, views_NSS3, params_VNP[:1], recipe, num_threads),
        COMPILED: partial(_by_torch, partial(compiled, *on_torch), num_threads),
        EAGER: partial(_by_torch, partial(augment, *on_torch), num_threads),
    }
    return {name: Runner(way, len(views_NSS3)) for name, way in ways.items()}


def _fused(
    views_NSS3: NDArray[np.uint8], params_VNP: NDArray[np.float32], recipe: Recipe, num_threads: int
) -> Iterator[object]:
    """Run our kernel; the threads share the batch as the loader's do."""
    num, side = views_NSS3.shape[:2]
    out_VNSS3 = np.empty((1, num, side, side, 3), np.float32)
    edges = np.linspace(0, num, num_threads + 1).astype(int).tolist()

    def work(thread: int) -> None:
        start, stop = edges[thread : thread + 2]
        augment_on_cpu(views_NSS3[start:stop, None], params_VNP[:, start:stop], recipe, out_VNSS3, start)

    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            list(pool.map(work, range(num_threads)))
            yield out_VNSS3


def _by_torch(way: Callable[[], object], num_threads: int) -> Iterator[object]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        while True:
            with torch.inference_mode():
                batch = way()
            yield batch
    finally:
        torch.set_num_threads(before)


def converter_rates(
    folder: Path, repeats: int, workers: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Measure images per second of our converter and of stock FFCV's, in turn, on the disk of the folder.

    Both run in a fresh process with as many workers. Imports and the listing of the folder are not counted.
    """
    rates: dict[str, list[float]] = {CONVERT_OURS: [], CONVERT_FFCV: []}
    with tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix="conversion.") as temporary:
        out = Path(temporary) / "out.beton"
        ours = ("-m", "dataset_tools", "convert", folder, out, "--workers", workers, "--overwrite")
        ffcv = ("-c", "from benchmarks.stages import ffcv; ffcv()", folder, out, workers)
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
