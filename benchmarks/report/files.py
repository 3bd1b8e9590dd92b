"""A benchmark's JSON file read key by key; what is of another shape is refused with a sentence."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def read_json(file: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object; ``mend`` is the command that makes the file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {file}; make it: {mend}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); make it again: {mend}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; make it again: {mend}")
    return content


@dataclass(frozen=True)
class Node:
    """An object within a JSON file that knows where it stands, for the sentence of an error."""

    value: Mapping[str, Any]
    where: str
    """The file and the keys down to here."""
    mend: str

    @staticmethod
    def read(file: Path, mend: str, benchmark: str) -> "Node":
        """The whole file of ``benchmark``; ``mend`` is the command that measures again.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is no JSON object, or of another benchmark.
        """
        node = Node(read_json(file, mend), str(file), mend)
        if (found := node.get("benchmark", str)) != benchmark:
            raise node.error(f"benchmark is {found!r}, expected {benchmark!r}")
        return node

    def error(self, what: str) -> ValueError:
        """What to raise where ``what`` is wrong here."""
        return ValueError(
            f"{self.where}: {what}; the file is of an older program or of another one, "
            f"measure again: {self.mend}"
        )

    def get(self, key: str, kind: type[_T]) -> _T:
        """The value under ``key``, which must be of ``kind``; an integer is a float too."""
        if key not in self.value:
            raise self.error(f"{key} is missing")
        value = self.value[key]
        number = kind is float and isinstance(value, int)
        if not (isinstance(value, kind) or number) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{key} is {value!r}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{key} is {value}, expected a finite number")
        return value  # type: ignore[no-any-return]

    def at(self, key: str) -> "Node":
        """The object under ``key``."""
        value: dict[str, Any] = self.get(key, dict)
        return Node(value, f"{self.where}: {key}", self.mend)

    def rows(self, key: str) -> list["Node"]:
        """The objects in the list under ``key``."""
        found: list[Any] = self.get(key, list)
        for number, row in enumerate(found):
            if not isinstance(row, dict):
                raise self.error(f"{key}: row {number} is {row!r}, expected dict")
        return [
            Node(row, f"{self.where}: {key}: row {number}", self.mend) for number, row in enumerate(found)
        ]

    def if_there(self, key: str) -> "Node":
        """The object under ``key``, an empty one where there is none."""
        return self.at(key) if key in self.value else Node({}, f"{self.where}: {key}", self.mend)

    def ratios(self) -> dict[str, float | None]:
        """All entries as numbers or None."""
        return {key: None if value is None else self.get(key, float) for key, value in self.value.items()}

    def environment(self) -> Mapping[str, Any]:
        """The object under ``environment``: what the figures were measured on."""
        environment = self.at("environment")
        for key in ("processor", "python", "system"):
            environment.get(key, str)
        environment.get("cores", int)
        environment.get("memory_gib", float)
        environment.at("versions")
        if "gpu" not in environment.value:
            raise environment.error("gpu is missing")
        return environment.value
