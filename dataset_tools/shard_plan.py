"""The plan of a conversion to shards, and its complete shards, so that a stopped conversion can continue.

While a set is made, its folder holds complete tars with their DALI indices, and

    convert.json       the plan: everything that determines the bytes of the shards
    000000.part.npz    the last file that is written for shard 0; it marks the shard as complete
    *.partial          files that are being written

At the end index.npy and set.json replace the first two.
"""

import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.randomness import EpochOrder
from pipelines.sets.manifest import Shard
from pipelines.sets.shards import INDEX_DTYPE, PLAN_NAME, dali_index_path
from training.files import write_atomically, write_json

DEFAULT_SHARD_SIZE = 2000
"""Images per shard: about 220 MB of ImageNet's JPEGs, or 641 files for 1.28 million images. A larger shard
makes reads from a disk or an object store more efficient. A smaller one divides more evenly among machines,
and a stopped conversion loses less work."""
PLAN_KEY = "plan"
"""The setting in a manifest that holds the plan's hash; only a converted set has it."""
PART_DTYPE = np.dtype([("source", "<u8"), *((name, INDEX_DTYPE[name]) for name in INDEX_DTYPE.names or ())])
"""A record of the index, and the index of the image in its source."""
FACTS_KEY = "told"  # codespell:ignore told
"""Name of an array in side files: everything but the records, as JSON. Existing files have this name."""
_NUMBERED_FILE = re.compile(r"\.?(\d{6,})\.(tar|idx|part\.npz)(\.partial)?")


@dataclass(frozen=True)
class Plan:
    """Everything that determines the bytes of a set of shards. Raises ValueError for unusable values."""

    source: str
    """Fingerprint of the source: which images it has, not what they contain."""
    count: int
    """Number of images to convert, from the first on."""
    seed: int
    """Seed of the order of the images in the shards."""
    shard_size: int
    """Images of the source per shard, including those that are left out."""
    settings: Mapping[str, Any]
    """How images are normalised."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size < 1 << 32:
            raise ValueError(f"shard_size is {self.shard_size}; a shard holds at least one image")
        EpochOrder(self.seed, 0, self.count)  # raises for an unusable seed or count

    @property
    def num_shards(self) -> int:
        """Number of shards of the whole set."""
        return -(-self.count // self.shard_size)

    @property
    def digest(self) -> str:
        """A hash of the plan."""
        return _sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())

    def places(self, shard: int) -> range:
        """Positions of a shard's images in the shuffled order."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def write(self, folder: Path) -> None:
        """Write the plan into the folder of the set."""
        write_json(folder / PLAN_NAME, dataclasses.asdict(self))

    @staticmethod
    def read(folder: Path) -> "Plan | None":
        """Return the plan of the set that is being made in ``folder``, or None.

        Raises:
            ValueError: if the file is not a plan.
        """
        file = folder / PLAN_NAME
        try:
            return Plan(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is not the plan of a conversion ({error}); remove it, or add --overwrite"
            ) from error

    def differences(self, other: "Plan") -> str:
        """Describe how this plan differs from another one."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        mine |= mine.pop("settings")
        theirs |= theirs.pop("settings")
        differ = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return ", ".join(
            "other images" if name == "source" else f"{name} {theirs.get(name)}, now {mine.get(name)}"
            for name in differ
        )


@dataclass(frozen=True)
class Part:
    """A complete shard of a set that is being made, as its side file describes it."""

    records: npt.NDArray[np.void]
    """(n,) of PART_DTYPE, in the order of the tar."""
    tar: Shard | None
    """None if all images of the shard are unusable: then it has no tar."""
    idx_sha256: str
    """Hash of DALI's index."""
    replaced: Mapping[str, int]
    """As in the manifest."""
    skipped: tuple[tuple[int, str], ...]
    """(index in the source, "path: reason") of the images left out."""

    def write(self, folder: Path, shard: int, digest: str) -> None:
        """Write the side file of a shard; ``digest`` is the plan's."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "records"}
        facts |= {"plan": digest, "shard": shard, "tar": self.tar and dataclasses.asdict(self.tar)}
        arrays: dict[str, Any] = {"records": self.records}
        arrays[FACTS_KEY] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        write_atomically(part_path(folder, shard), lambda file: np.savez(file, **arrays))

    @staticmethod
    def read(folder: Path, shard: int, digest: str) -> "Part | None":
        """Read the side file of a shard; None if it is missing, damaged or of another plan."""
        try:
            with np.load(part_path(folder, shard), allow_pickle=False) as file:
                records, facts = file["records"], json.loads(file[FACTS_KEY].tobytes())
            if (facts.pop("plan"), facts.pop("shard")) != (digest, shard) or records.dtype != PART_DTYPE:
                return None
            facts["tar"] = facts["tar"] and Shard(**facts["tar"])
            facts["skipped"] = tuple((int(index), str(line)) for index, line in facts["skipped"])
            return Part(records, **facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError):
            return None

    def has_files(self, folder: Path) -> bool:
        """Whether the tar has the right size and its index the right hash. The tar is not read."""
        if self.tar is None:
            return True
        tar = folder / self.tar.name
        try:
            idx = dali_index_path(tar).read_bytes()
            return tar.stat().st_size == self.tar.num_bytes and _sha256(idx) == self.idx_sha256
        except FileNotFoundError:
            return False


def part_path(folder: Path, shard: int) -> Path:
    """Path of a shard's side file."""
    return folder / f"{shard:06d}.part.npz"


def tar_name(shard: int) -> str:
    """Name of a shard's tar."""
    return f"{shard:06d}.tar"


def complete_part(folder: Path, shard: int, digest: str) -> Part | None:
    """Return a shard if it is complete and of the plan with this digest."""
    part = Part.read(folder, shard, digest)
    return part if part is not None and part.has_files(folder) else None


def numbered_files(folder: Path) -> dict[Path, int]:
    """Return path → shard number of the files in a folder that are named as a conversion names them."""
    found = ((path, _NUMBERED_FILE.fullmatch(path.name)) for path in folder.iterdir())
    return {path: int(match.group(1)) for path, match in found if match}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
