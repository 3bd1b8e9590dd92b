"""Configs and pickled weights of others, read without running their code."""

import io
import math
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

from training.checkpoint import CheckpointError

BASE = "_BASE_"
"""The key of a config by which it names the ones it is based on."""


def config_files(file: Path) -> list[Path]:
    """A config and all configs it is based on, each of them local and plain YAML.

    Detectron2 by itself runs code that YAML tags ask for, and fetches bases from the network.
    Raises FileNotFoundError for a file that is missing, ValueError for one that is no plain YAML mapping, for
    a base that is no local file, and for configs that are based on themselves.
    """
    return _with_bases(file, ())


def _with_bases(file: Path, above: tuple[Path, ...]) -> list[Path]:
    if file.resolve() in above:
        raise ValueError(f"{file} is based on itself by its {BASE}; take one of the two out")
    if not file.is_file():
        needed = f", which {above[-1]} is based on" if above else ""
        raise FileNotFoundError(f"there is no {file}{needed}; check the path")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"the config is refused: {told}; {file} must be YAML with Detectron2's options, without tags"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}; a config is YAML with Detectron2's options"
        )
    found, bases = [file], content.get(BASE, [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base or "\0" in base:
            raise ValueError(f"{file} is based on {base!r}; a base must be a local file, fetch it first")
        # os.path leaves the name of an unknown user as it is, as Detectron2 does.
        base_file = file.parent / os.path.expanduser(base)  # noqa: PTH111
        found += _with_bases(base_file, (*above, file.resolve()))
    return found


# ------------------------------------------------------------------------------------------------------------
# Pickles of arrays


def read_pickled_weights(path: Path) -> dict[str, Any]:
    """The arrays in a .pkl of Detectron2's or Caffe2's kind, as Detectron2's checkpointer takes them.

    No function named in a pickle is imported; the few that build arrays are replaced by our own.
    Returns ``{"model": {name: array}, "__author__", "matching_heuristics"}``.
    Raises CheckpointError for a file that is damaged, or holds anything but arrays of numbers.
    """
    try:
        content = _Unpickler(path.read_bytes()).load()
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where names and arrays were expected")
        ours = {"model", "__author__"} <= content.keys()
        arrays = content["model"] if ours else content.get("blobs", content)
        if not isinstance(arrays, dict):
            raise ValueError(f"a {type(arrays).__name__} where names and arrays were expected")
        model = {
            str(name): cast(_Array, array).numpy()
            for name, array in arrays.items()
            if ours or not str(name).endswith("_momentum")
        }
        if not model:
            raise ValueError("no arrays")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(
            f"{path} is cut short or no pickle of arrays ({error}); convert the encoder again, by "
            "detection.convert_to_detectron2 to a .pth"
        ) from error
    if ours:
        heuristics = content.get("matching_heuristics") is True
        return {"model": model, "__author__": str(content["__author__"]), "matching_heuristics": heuristics}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


class _DType:
    """Stands for ``numpy.dtype`` in a pickle."""

    def __init__(self, code: object, *_: object) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if not (isinstance(self._code, str) and re.fullmatch("b1|f[248]|[iu][1248]", self._code)):
            raise ValueError(f"an array of {self._code!r}, which is no kind of number")
        if self._order not in ("=", "|", "<", ">"):
            raise ValueError(f"an array in the byte order {self._order!r}")
        return np.dtype(f"{self._order}{self._code}")


class _Array:
    """Stands for an array in a pickle."""

    def __init__(self, *_: object) -> None:
        self._value: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        self._fill(data, dtype, shape, "F" if by_columns else "C")

    @classmethod
    def of_buffer(cls, data: object, dtype: object, shape: object, order: object) -> "_Array":
        """What pickles of protocol 5 have."""
        array = cls()
        array._fill(data, dtype, shape, order)
        return array

    def _fill(self, data: object, dtype: object, shape: object, order: object) -> None:
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin1")
        known = isinstance(data, (bytes, bytearray)) and isinstance(dtype, _DType) and order in ("C", "F")
        if not known or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"an array of shape {shape!r} and order {order!r}")
        kind = cast(_DType, dtype).numpy()
        content = bytearray(cast(bytes, data))
        if len(content) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{len(content)} bytes for an array of shape {shape} and type {kind}")
        flat = np.frombuffer(content, kind)
        self._value = flat.reshape(shape, order="F" if order == "F" else "C").astype(kind.newbyteorder("="))

    def numpy(self) -> NDArray[Any]:
        if self._value is None:
            raise ValueError("an array without values")
        return self._value


class _Bytes:
    """What makes bytes in a pickle. Methods, because a pickle may change the attributes of functions."""

    @classmethod
    def encoded(cls, text: str, encoding: str) -> bytes:
        """How pickles of protocol 2 hold bytes."""
        if encoding != "latin1":
            raise ValueError(f"bytes written as {encoding!r}")
        return text.encode("latin1")

    @classmethod
    def none(cls) -> bytes:
        """How they hold no bytes at all."""
        return b""


_MAKERS: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument only
    ("_codecs", "encode"): _Bytes.encoded,
    ("__builtin__", "bytes"): _Bytes.none,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Array.of_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in _MAKERS alone."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module: str, name: str) -> object:
        """What stands for a name."""
        if (module, name) not in _MAKERS:
            raise CheckpointError(
                f"the pickle asks for {module}.{name}, which could run code, and was not loaded; take a file "
                "of arrays alone, or convert it to a .pth where you trust it"
            )
        return _MAKERS[module, name]
