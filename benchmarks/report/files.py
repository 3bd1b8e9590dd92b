"""The benchmarks' JSON files and their shapes; a file of another shape is refused with its key.

A shape looks like the JSON itself: a type; a string, which the value must equal; a tuple of a shape and None,
where the value may be null; a list of one shape, for each item; or a dictionary of shapes by key. A key that
ends in "?" may be missing, "*" stands for each key, and further keys are allowed. :class:`Some` holds the
shape of a list or dictionary that must not be empty.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Some(NamedTuple):
    """A list or dictionary that must not be empty."""

    shape: Any


def read_json(file: Path, command: str) -> dict[str, Any]:
    """Read a JSON object that ``command`` writes.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} does not exist; write it with: {command}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); write it again: {command}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; write it again: {command}")
    return content


def check(value: Any, shape: Any, file: Path, command: str) -> None:
    """Raise a ValueError that names the file, the key and ``command`` if a value is of another shape."""
    for problem in _problems(value, shape, ""):
        raise ValueError(
            f"{file}: {problem}; the file is from an older program or another one, measure again: {command}"
        )


def _problems(value: Any, shape: Any, name: str) -> Iterator[str]:
    """Yield the differences between a value and its shape, each after the keys that lead to it."""
    within = f"{name}: " if name else ""
    if isinstance(shape, Some):
        if not value:
            yield f"{name} is empty"
        yield from _problems(value, shape.shape, name)
    elif isinstance(shape, tuple):
        if value is not None:
            yield from _problems(value, shape[0], name)
    elif expected := _mismatch(value, shape):
        yield f"{name} is {value!r}, expected {expected}"
    elif isinstance(shape, list):
        for number, item in enumerate(value):
            yield from _problems(item, shape[0], f"{within}row {number}")
    elif isinstance(shape, dict):
        for key, found in shape.items():
            plain = key.removesuffix("?")
            if plain == key != "*" and key not in value:
                yield f"{within}{key} is missing"
            for each in value if key == "*" else {plain} & value.keys():
                yield from _problems(value[each], found, within + each)


def _mismatch(value: Any, shape: str | type | list[Any] | dict[str, Any]) -> str | None:
    """Return what was expected instead of a value, without looking at its items."""
    if isinstance(shape, str):
        return None if value == shape else repr(shape)
    kind = shape if isinstance(shape, type) else type(shape)
    # An integer is also a float; a bool is no number.
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        return kind.__name__
    return "a finite number" if isinstance(value, float) and not math.isfinite(value) else None
