"""DALI's own operators on the CPU compared with torchvision's: why the loader uses some and not others.

None of these rows describes the loader; they are for information and may fail.

Shape letters: N images or views, V views, S side in pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torchvision.transforms.v2 import functional as on_tensor

from pipelines.augment.draws import blur_radius_px
from pipelines.recipe import moco_v2
from tests.parity import geometry, photometric
from tests.parity.comparisons import MEASURES, Errors, Row
from tests.parity.photometric import FLOAT, REFERENCES, VALUES
from tests.parity.samples import Samples

NAME = "DALI operators"
_DEGREES_PER_TURN = 360
_FLOATS: dict[str, Any] = {"dtype": types.FLOAT}
_RESAMPLE = {"antialias": True, "interp_type": types.INTERP_LINEAR}
_LUMA = (0.299, 0.587, 0.114)
_BLUR_WINDOW = 2 * blur_radius_px(photometric.PLAIN.blur_sigma_px[1], photometric.SIDE_PX) + 1


def _about_mean_grey(view: Any, factor: float) -> Any:
    """Contrast about each view's own mean grey, computed by DALI first."""
    weighted = fn.cast(view, dtype=types.FLOAT) * types.Constant(np.array(_LUMA, np.float32))
    return fn.contrast(view, contrast=factor, contrast_center=3 * fn.reductions.mean(weighted), **_FLOATS)


def _grey(view: Any, _: float) -> Any:
    grey = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
    return fn.cat(grey, grey, grey, axis=2)


def _blur(view: Any, sigma: float, **window: Any) -> Any:
    return fn.gaussian_blur(view, sigma=sigma, **window, **_FLOATS)


VARIANTS: Mapping[tuple[str, str], Callable[[Any, float], Any]] = {
    ("brightness", "fn.brightness"): lambda x, f: fn.brightness(x, brightness=f, **_FLOATS),
    ("contrast", "fn.contrast, about mid-grey"): lambda x, f: fn.contrast(x, contrast=f, **_FLOATS),
    ("contrast", "fn.contrast, contrast_center the view's mean grey"): _about_mean_grey,
    ("saturation", "fn.saturation"): lambda x, f: fn.saturation(x, saturation=f, **_FLOATS),
    ("hue", "fn.hue, 360° a turn"): lambda x, f: fn.hue(x, hue=_DEGREES_PER_TURN * f, **_FLOATS),
    ("grey", "fn.color_twist, saturation 0"): lambda x, _: fn.color_twist(x, saturation=0.0, **_FLOATS),
    ("grey", "fn.color_space_conversion to grey"): _grey,
    ("blur", f"fn.gaussian_blur, window {_BLUR_WINDOW} px"): partial(_blur, window_size=_BLUR_WINDOW),
    ("blur", "fn.gaussian_blur, its own window"): _blur,
}
"""Photometric operation and DALI's operator for it → a function of a (S, S, 3) uint8 view and the value."""


def rows(samples: Samples, views: Tensor) -> Iterator[Row]:
    """Compare DALI's variants of decoding and resizing, then its photometric operators and normalisation."""
    for how, options in _DECODERS.items():
        crops = _cropper(samples, options, roi=False)
        yield from geometry.decode_rows(NAME, crops, samples, used=False, how=how)
    for how, roi in (("fn.crop, fn.resize", False), ("fn.resize with roi_start, roi_end", True)):
        crops = _cropper(samples, {}, roi=roi)
        yield from geometry.resize_rows(NAME, crops, samples, "pixels", used=False, how=how)
    yield geometry.flip_row(NAME, _cropper(samples, {}, roi=False), samples, used=False, how="fn.flip")
    for (operation, how), define in VARIANTS.items():
        errors = Errors()
        for value in VALUES[operation]:
            got_NSS3 = _run(lambda x, define=define, value=value: define(x, value), views)  # type: ignore[misc]
            expected = REFERENCES[FLOAT](views, [[(operation, value)]] * len(views))
            errors.add(got_NSS3.clip(0, 255), expected.permute(0, 2, 3, 1))
        yield errors.row(MEASURES[f"{operation} / {FLOAT}"], NAME, used=False, how=how)
    yield _normalise_row(views)


def _normalise_row(views: Tensor) -> Row:
    recipe, errors = moco_v2(), Errors()
    mean, std = ([255 * x for x in numbers] for numbers in (recipe.mean, recipe.std))
    layout: dict[str, Any] = {"output_layout": "HWC", "mean": mean, "std": std}
    got_NSS3 = _run(lambda x: fn.crop_mirror_normalize(x, **layout, **_FLOATS), views)
    expected = on_tensor.normalize(photometric.images(views), list(recipe.mean), list(recipe.std))
    errors.add(got_NSS3, expected.permute(0, 2, 3, 1))
    return errors.row(MEASURES["normalise"], NAME, used=False, how="fn.crop_mirror_normalize")


def _run(operator: Callable[[Any], Any], views: Tensor) -> NDArray[np.float32]:
    """Apply an operator to uint8 views; return (N, S, S, 3) float32."""

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
    """Return a function that decodes, cuts and resizes with DALI; with ``roi`` the resizing operator cuts."""

    def crops(index_N: NDArray[np.int64], boxes_NV5: NDArray[np.int32], side: int) -> NDArray[np.uint8]:
        files = [(samples.folder / samples.names[i]).read_bytes() for i in index_N.tolist()]
        encoded = [np.frombuffer(file, np.uint8) for file in files]

        @pipeline_def(batch_size=len(index_N), num_threads=1, device_id=None)
        def define(boxes_N5: NDArray[np.float32]) -> Any:
            payload = fn.external_source(source=[encoded], batch=True)
            corner = fn.external_source(source=[list(boxes_N5[:, :2])], batch=True)
            extent = fn.external_source(source=[list(boxes_N5[:, 2:4])], batch=True)
            mirrored = fn.external_source(source=[list(boxes_N5[:, 4].astype(np.int32))], batch=True)
            image = fn.decoders.image(payload, device="cpu", output_type=types.RGB, **decoding)
            if roi:
                region = {"roi_start": corner, "roi_end": corner + extent}
            else:
                absolute: dict[str, Any] = {"normalized_anchor": False, "normalized_shape": False}
                image, region = fn.slice(image, corner, extent, axis_names="HW", **absolute), {}
            view = fn.resize(image, size=[side, side], **region, **_RESAMPLE)
            return fn.flip(view, horizontal=mirrored)

        out_NVSS3 = np.empty((*boxes_NV5.shape[:2], side, side, 3), np.uint8)
        for v in range(boxes_NV5.shape[1]):
            pipeline = define(boxes_NV5[:, v].astype(np.float32))
            pipeline.build()
            (views,) = pipeline.run()
            out_NVSS3[:, v] = views.as_array()
        return out_NVSS3

    return crops
