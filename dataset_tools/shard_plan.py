"""What a conversion to shards will make, and what of it is made: so that it can go on, here or elsewhere.

While a set is made its folder holds, beside finished tars and their DALI indices,

    convert.json       the plan: everything that decides which bytes the shards get
    000000.part.npz    written last of all that belongs to shard 0, and so the mark that it is whole
    *.partial          what is being written

and at the end index.npy and set.json take the place of the first two kinds.
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

from dataset_tools.sources import Source
from pipelines.randomness import EpochOrder
from pipelines.sets.manifest import Shard
from pipelines.sets.shards import INDEX_DTYPE, PLAN_NAME
from training.files import write_atomically, write_json

DEFAULT_SHARD_SIZE = 2000
"""Pictures a shard: some 220 MB of ImageNet's JPEGs. Large enough that a disk or an object store reads it in
long runs and 1.28 million pictures are 641 files, small enough that a thousand shards can be shared among
machines evenly, and that a stopped conversion loses seconds."""
PART_DTYPE = np.dtype([("source", "<u8"), *((name, INDEX_DTYPE[name]) for name in INDEX_DTYPE.names or ())])
"""A record of the index, and the number of the picture in its source."""
_OURS = re.compile(r"\.?(\d{6,})\.(tar|idx|part\.npz)(\.partial)?")


@dataclass(frozen=True)
class Plan:
    """Everything that decides which bytes a set of shards holds."""

    source: str
    """The source's fingerprint: which pictures there are, not what is in them."""
    count: int
    """Pictures of the source to convert, from the first on."""
    seed: int
    """Of the order in which they are put into shards."""
    shard_size: int
    """Pictures of the source per shard; those left out count."""
    settings: Mapping[str, Any]
    """How pictures are normalised."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size < 1 << 32:
            raise ValueError(f"shard_size is {self.shard_size}; a shard holds at least one picture")
        EpochOrder(self.seed, 0, self.count)  # says what is wrong with seed or count

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return -(-self.count // self.shard_size)

    @property
    def digest(self) -> str:
        """A hash of the plan."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def places(self, shard: int) -> range:
        """The places in the order of pictures that a shard holds."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def write(self, folder: Path) -> None:
        """Put the plan into the folder it is for."""
        write_json(folder / PLAN_NAME, dataclasses.asdict(self))

    @staticmethod
    def read(folder: Path) -> "Plan | None":
        """Return the plan of the set being made in ``folder``, None where none is.

        Raises ValueError, naming the file, where it is no plan.
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
        """What differs, in words."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        mine |= mine.pop("settings")
        theirs |= theirs.pop("settings")
        differ = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return ", ".join(
            "other pictures" if name == "source" else f"{name} {theirs.get(name)}, now {mine.get(name)}"
            for name in differ
        )


def plan_for(source: Source, count: int, settings: Mapping[str, Any], *, seed: int, shard_size: int) -> Plan:
    """Plan the conversion of the first ``count`` pictures of a source.

    Raises ValueError for an unusable seed or shard size.
    """
    return Plan(source.fingerprint(), count, seed, shard_size, dict(settings))


@dataclass(frozen=True)
class Part:
    """A whole shard of a set that is being made."""

    records: npt.NDArray[np.void]
    """(n,) of PART_DTYPE, in the order in which they lie in the tar."""
    tar: Shard | None
    """None for a shard none of whose pictures could be used: it has no tar."""
    idx_sha256: str
    """Hash of DALI's index."""
    replaced: Mapping[str, int]
    """As in the manifest."""
    skipped: tuple[tuple[int, str], ...]
    """(number in the source, "path: reason") of the pictures left out."""

    def write(self, folder: Path, shard: int, digest: str) -> None:
        """Write the side file of a shard of the plan with this digest."""
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "records"}
        told |= {"plan": digest, "shard": shard, "tar": self.tar and dataclasses.asdict(self.tar)}
        text = np.frombuffer(json.dumps(told).encode(), np.uint8)
        write_atomically(
            part_path(folder, shard), lambda file: np.savez(file, records=self.records, told=text)
        )

    @staticmethod
    def read(folder: Path, shard: int, digest: str) -> "Part | None":
        """Return a shard by its side file; None where that is missing, damaged or of another plan."""
        try:
            with np.load(part_path(folder, shard), allow_pickle=False) as file:
                records, told = file["records"], json.loads(file["told"].tobytes())
            if (told.pop("plan"), told.pop("shard")) != (digest, shard) or records.dtype != PART_DTYPE:
                return None
            told["tar"] = told["tar"] and Shard(**told["tar"])
            told["skipped"] = tuple((int(index), str(line)) for index, line in told["skipped"])
            return Part(records, **told)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError):
            return None

    def stands(self, folder: Path) -> bool:
        """Do the tar and its index lie there, of the right size? The tar is not read."""
        if self.tar is None:
            return True
        tar = folder / self.tar.name
        try:
            idx = tar.with_suffix(".idx").read_bytes()
            return tar.stat().st_size == self.tar.num_bytes and _sha256(idx) == self.idx_sha256
        except FileNotFoundError:
            return False


def part_path(folder: Path, shard: int) -> Path:
    """The side file of a shard."""
    return folder / f"{shard:06d}.part.npz"


def tar_name(shard: int) -> str:
    """The name of a shard's tar."""
    return f"{shard:06d}.tar"


def whole_part(folder: Path, shard: int, digest: str) -> Part | None:
    """The shard, where it is whole and of this plan."""
    part = Part.read(folder, shard, digest)
    return part if part is not None and part.stands(folder) else None


def numbered_files(folder: Path) -> dict[Path, int]:
    """The files whose names a conversion gives, and the numbers of their shards."""
    found = ((path, _OURS.fullmatch(path.name)) for path in folder.iterdir())
    return {path: int(match.group(1)) for path, match in found if match}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
