"""DALI's own operators on the CPU beside torchvision's: why we take some of them and not the others.

None of these rows is about what our loader does; they are information, and may fail.

Shape letters: N pictures or views, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torchvision.transforms.v2 import functional as on_tensor

from benchmarks.parity import colour, geometry
from benchmarks.parity.colour import FLOAT, REFERENCES, VALUES
from benchmarks.parity.limits import MEASURES
from benchmarks.parity.measures import Errors, Row
from benchmarks.parity.samples import Samples
from pipelines.augment.draws import blur_radius_px
from pipelines.recipe import moco_v2

NAME = "DALI operators"
_DEGREES_PER_TURN = 360
_FLOATS: dict[str, Any] = {"dtype": types.FLOAT}
_RESAMPLE = {"antialias": True, "interp_type": types.INTERP_LINEAR}
_LUMA = (0.299, 0.587, 0.114)
_BLUR_WINDOW = 2 * blur_radius_px(colour.PLAIN.blur_sigma_px[1], colour.SIDE_PX) + 1


@dataclass(frozen=True)
class Way:
    """An operator for one of the photometric operations."""

    operation: str
    how: str
    define: Callable[[Any, float], Any]
    """(S, S, 3) uint8 view and the value → the view in grey levels; clamped afterwards."""


def _about_mean_grey(view: Any, factor: float) -> Any:
    """Contrast about each view's own mean grey, which DALI has to compute first."""
    weighted = fn.cast(view, dtype=types.FLOAT) * types.Constant(np.array(_LUMA, np.float32))
    return fn.contrast(view, contrast=factor, contrast_center=3 * fn.reductions.mean(weighted), **_FLOATS)


WAYS = (
    Way("brightness", "fn.brightness", lambda x, f: fn.brightness(x, brightness=f, **_FLOATS)),
    Way("contrast", "fn.contrast, about mid-grey", lambda x, f: fn.contrast(x, contrast=f, **_FLOATS)),
    Way("contrast", "fn.contrast, contrast_center the view's mean grey", _about_mean_grey),
    Way("saturation", "fn.saturation", lambda x, f: fn.saturation(x, saturation=f, **_FLOATS)),
    Way("hue", "fn.hue, 360° a turn", lambda x, f: fn.hue(x, hue=_DEGREES_PER_TURN * f, **_FLOATS)),
    Way("grey", "fn.color_twist, saturation 0", lambda x, _: fn.color_twist(x, saturation=0.0, **_FLOATS)),
    Way(
        "grey",
        "fn.color_space_conversion to grey",
        lambda x, _: fn.cat(
            *[fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)] * 3, axis=2
        ),
    ),
    Way(
        "blur",
        f"fn.gaussian_blur, window {_BLUR_WINDOW} px",
        lambda x, sigma: fn.gaussian_blur(x, sigma=sigma, window_size=_BLUR_WINDOW, **_FLOATS),
    ),
    Way(
        "blur",
        "fn.gaussian_blur, its own window",
        lambda x, sigma: fn.gaussian_blur(x, sigma=sigma, **_FLOATS),
    ),
)


def rows(samples: Samples, views: Tensor) -> Iterator[Row]:
    """Decoding and resizing in the ways DALI offers, then its photometric operators and normalisation."""
    for how, options in _DECODERS.items():
        yield from geometry.decode_rows(
            NAME, _cropper(samples, options, roi=False), samples, used=False, how=how
        )
    for how, roi in (("fn.crop, fn.resize", False), ("fn.resize with roi_start, roi_end", True)):
        crops = _cropper(samples, {}, roi=roi)
        yield from geometry.resize_rows(NAME, crops, samples, "pixels", used=False, how=how)
    yield geometry.flip_row(NAME, _cropper(samples, {}, roi=False), samples, used=False, how="fn.flip")
    for way in WAYS:
        errors = Errors()
        for value in VALUES[way.operation]:
            got_NSS3 = _run(lambda x, way=way, value=value: way.define(x, value), views)  # type: ignore[misc]
            expected = REFERENCES[FLOAT](views, [[(way.operation, value)]] * len(views))
            errors.add(got_NSS3.clip(0, 255), expected.permute(0, 2, 3, 1))
        yield errors.row(MEASURES[f"{way.operation} / {FLOAT}"], NAME, used=False, how=way.how)
    yield _normalise_row(views)


def _normalise_row(views: Tensor) -> Row:
    recipe, errors = moco_v2(), Errors()
    mean, std = ([255 * x for x in numbers] for numbers in (recipe.mean, recipe.std))
    layout: dict[str, Any] = {"output_layout": "HWC", "mean": mean, "std": std}
    got_NSS3 = _run(lambda x: fn.crop_mirror_normalize(x, **layout, **_FLOATS), views)
    expected = on_tensor.normalize(colour.images(views), list(recipe.mean), list(recipe.std))
    errors.add(got_NSS3, expected.permute(0, 2, 3, 1))
    return errors.row(MEASURES["normalise"], NAME, used=False, how="fn.crop_mirror_normalize")


def _run(operator: Callable[[Any], Any], views: Tensor) -> NDArray[np.float32]:
    """(N, S, S, 3) float32 of one operator on uint8 views."""

    @pipeline_def(batch_size=len(views), num_threads=1, device_id=None)
    def define() -> Any:
        return operator(fn.external_source(source=[list(views.numpy())], batch=True, layout="HWC"))

    pipeline = define()
    pipeline.build()
    (done,) = pipeline.run()
    return np.asarray(done.as_array(), np.float32)


_DECODERS: Mapping[str, Mapping[str, Any]] = {
    "fn.decoders.image": {},
    "fn.decoders.image, use_fast_idct": {"use_fast_idct": True},
}


def _cropper(samples: Samples, decoding: Mapping[str, Any], *, roi: bool) -> geometry.Cropper:
    """Decode, cut and resize by DALI; with ``roi`` cutting is left to the resizing operator."""

    def crops(index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int) -> NDArray[np.uint8]:
        files = [(samples.folder / samples.names[i]).read_bytes() for i in index_N.tolist()]
        encoded = [np.frombuffer(file, np.uint8) for file in files]

        @pipeline_def(batch_size=len(index_N), num_threads=1, device_id=None)
        def define(boxes_N5: NDArray[np.float32]) -> Any:
            payload = fn.external_source(source=[encoded], batch=True)
            corner = fn.external_source(source=[list(boxes_N5[:, :2])], batch=True)
            extent = fn.external_source(source=[list(boxes_N5[:, 2:4])], batch=True)
            mirrored = fn.external_source(source=[list(boxes_N5[:, 4].astype(np.int32))], batch=True)
            picture = fn.decoders.image(payload, device="cpu", output_type=types.RGB, **decoding)
            if roi:
                region = {"roi_start": corner, "roi_end": corner + extent}
            else:
                absolute: dict[str, Any] = {"normalized_anchor": False, "normalized_shape": False}
                picture, region = fn.slice(picture, corner, extent, axis_names="HW", **absolute), {}
            view = fn.resize(picture, size=[side, side], **region, **_RESAMPLE)
            return fn.flip(view, horizontal=mirrored)

        out_NVSS3 = np.empty((*boxes_NV5.shape[:2], side, side, 3), np.uint8)
        for v in range(boxes_NV5.shape[1]):
            pipeline = define(boxes_NV5[:, v].astype(np.float32))
            pipeline.build()
            (views,) = pipeline.run()
            out_NVSS3[:, v] = views.as_array()
        return out_NVSS3

    return crops
