"""The benchmarks' JSON files and their shapes; a file of another shape is refused with its key.

A shape looks like the JSON itself. It is a dictionary of shapes by key, where a key that ends in "?" may be
missing and further keys are allowed; a type; a string, which the value must equal; a tuple of a shape and
None, where the value may be null; or :class:`Each`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Each:
    """An object with any keys, or a list, in which all values have one shape."""

    shape: Any
    kind: type = dict
    """dict or list."""
    some: bool = False
    """Whether it must not be empty."""
    needed: tuple[str, ...] = ()
    """Keys that must exist."""
    known: tuple[str, ...] = ()
    """The keys that may exist; any, if this is empty."""


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


def read_checked(file: Path, shape: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Read a JSON object that ``command`` writes, and check its shape.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is of another shape; the message names the file and the key.
    """
    content = read_json(file, command)
    for problem in problems(content, shape):
        raise ValueError(
            f"{file}: {problem}; the file is from an older program or another one, measure again: {command}"
        )
    return content


def problems(value: Any, shape: Any, name: str = "") -> Iterator[str]:
    """Yield the differences between a value and its shape, each after the keys that lead to it.

    An integer is also a float; numbers must be finite.
    """
    within = f"{name}: " if name else ""
    if isinstance(shape, tuple):
        if value is not None:
            yield from problems(value, shape[0], name)
    elif isinstance(shape, str):
        if value != shape:
            yield f"{name} is {value!r}, expected {shape!r}"
    elif isinstance(shape, type):
        kinds = (int, float) if shape is float else shape
        if not isinstance(value, kinds) or (isinstance(value, bool) and shape is not bool):
            yield f"{name} is {value!r}, expected {shape.__name__}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}, expected a finite number"
    elif isinstance(shape, Mapping):
        yield from problems(value, dict, name)
        for key, found in shape.items() if isinstance(value, dict) else ():
            if (plain := key.removesuffix("?")) in value:
                yield from problems(value[plain], found, within + plain)
            elif plain == key:
                yield f"{within}{key} is missing"
    else:
        yield from problems(value, shape.kind, name)
        if isinstance(value, shape.kind):
            yield from _problems_of_each(value, shape, name)


def _problems_of_each(value: Any, shape: Each, name: str) -> Iterator[str]:
    if shape.some and not value:
        yield f"{name} is empty"
    if isinstance(value, list):
        value = {f"row {number}": item for number, item in enumerate(value)}
    for key in shape.needed:
        if key not in value:
            yield f"{name}: {key} is missing"
    for key, item in value.items():
        if shape.known and key not in shape.known:
            yield f"{name} has {key}, expected some of {', '.join(shape.known)}"
        yield from problems(item, shape.shape, f"{name}: {key}")
