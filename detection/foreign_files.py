"""Reading foreign configs and pickled weights without running code in them."""

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
"""Key of the list of configs on which a config is based."""


def config_files(file: Path) -> list[Path]:
    """A config and all configs it is based on, each checked to be local and plain YAML.

    Detectron2 itself would run code that YAML tags name, and would download configs.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not a plain YAML mapping, a base is not a local file, or a config is based on
            itself.
    """
    return _with_bases(file, ())


def _with_bases(file: Path, above: tuple[Path, ...]) -> list[Path]:
    if file.resolve() in above:
        raise ValueError(f"{file} is based on itself through {BASE}; remove one of the references")
    if not file.is_file():
        reference = f", which {above[-1]} is based on" if above else ""
        raise FileNotFoundError(f"there is no {file}{reference}; check the path")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the config is refused: {reason}; {file} must be YAML with Detectron2's options, without tags"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}; a config is YAML with Detectron2's options"
        )
    found, bases = [file], content.get(BASE, [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base or "\0" in base:
            raise ValueError(f"{file} is based on {base!r}; a base must be a local file, download it first")
        # As in Detectron2, os.path.expanduser keeps the name of an unknown user.
        base_file = file.parent / os.path.expanduser(base)  # noqa: PTH111
        found += _with_bases(base_file, (*above, file.resolve()))
    return found


# ------------------------------------------------------------------------------------------------------------
# Pickled arrays


def read_pickled_weights(path: Path) -> dict[str, Any]:
    """Read the arrays of a .pkl in Detectron2's or Caffe2's format.

    Nothing that the pickle names is imported. Our own replacements build the arrays.

    Returns:
        ``{"model": {name: array}, "__author__", "matching_heuristics"}``, as Detectron2's checkpointer
        expects it.

    Raises:
        CheckpointError: if the file is damaged, or holds anything but arrays of numbers.
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
            f"{path} is truncated or not a pickle of arrays ({error}); convert the encoder again "
            "to a .pth with detection.convert_to_detectron2"
        ) from error
    if ours:
        heuristics = content.get("matching_heuristics") is True
        return {"model": model, "__author__": str(content["__author__"]), "matching_heuristics": heuristics}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


class _DType:
    """Replaces ``numpy.dtype`` in a pickle."""

    def __init__(self, code: object, *_: object) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if not (isinstance(self._code, str) and re.fullmatch("b1|f[248]|[iu][1248]", self._code)):
            raise ValueError(f"an array of {self._code!r}, which is not a numeric type")
        if self._order not in ("=", "|", "<", ">"):
            raise ValueError(f"an array in the byte order {self._order!r}")
        return np.dtype(f"{self._order}{self._code}")


class _Array:
    """Replaces ``numpy.ndarray`` in a pickle."""

    def __init__(self, *_: object) -> None:
        self._value: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        self._fill(data, dtype, shape, "F" if by_columns else "C")

    @classmethod
    def from_buffer(cls, data: object, dtype: object, shape: object, order: object) -> "_Array":
        """Build an array of a pickle of protocol 5."""
        array = cls()
        array._fill(data, dtype, shape, order)
        return array

    def _fill(self, data: object, dtype: object, shape: object, order: object) -> None:
        if isinstance(data, str):  # written by Python 2
            data = data.encode("latin1")
        valid = isinstance(data, (bytes, bytearray)) and isinstance(dtype, _DType) and order in ("C", "F")
        if not valid or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
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
    """Replaces functions that build bytes. Methods, because a pickle can change attributes of functions."""

    @classmethod
    def encode(cls, text: str, encoding: str) -> bytes:
        """Encode bytes that a pickle of protocol 2 stores as text."""
        if encoding != "latin1":
            raise ValueError(f"bytes written as {encoding!r}")
        return text.encode("latin1")

    @classmethod
    def empty(cls) -> bytes:
        """Empty bytes, as pickles of protocol 2 hold them."""
        return b""


_REPLACEMENTS: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "numpy.ndarray",  # only an argument, never called
    ("_codecs", "encode"): _Bytes.encode,
    ("__builtin__", "bytes"): _Bytes.empty,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Array.from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in _REPLACEMENTS."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module: str, name: str) -> object:
        """The replacement for a name. Raises CheckpointError for any other name."""
        if (module, name) not in _REPLACEMENTS:
            raise CheckpointError(
                f"the pickle imports {module}.{name}, which could run code, and was not loaded; give a file "
                "that holds only arrays, or convert it to a .pth if you trust it"
            )
        return _REPLACEMENTS[module, name]
