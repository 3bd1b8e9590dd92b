"""Fashion-MNIST, seventy thousand small images with labels, as two compiled sets of the raw tier."""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset_tools.convert import Converted, convert_work
from dataset_tools.normalise import Normalising
from dataset_tools.sources import Sample
from dataset_tools.work import Progress, Work
from pipelines.sets.folder import PassedOver

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""
_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class IdxPair:
    """The two files of one split."""

    images: Path
    labels: Path


def find_split(folder: str | Path, split: str) -> IdxPair | None:
    """Return the idx files of ``split`` (train, test) in ``folder``, gzipped or plain; None if missing."""
    if split not in _PREFIXES:
        raise ValueError(f"split is {split!r}; known are {', '.join(_PREFIXES)}")
    for suffix in (".gz", ""):
        stem = Path(folder) / _PREFIXES[split]
        pair = IdxPair(*(Path(f"{stem}-{kind}-ubyte{suffix}") for kind in ("images-idx3", "labels-idx1")))
        if pair.images.is_file() and pair.labels.is_file():
            return pair
    return None


def locate(download_to: str | Path = "data", *, folder: str | Path = DEBIAN_FOLDER) -> dict[str, IdxPair]:
    """Return the files of both splits: from ``folder``, or from torchvision's download in ``download_to``.

    Raises:
        RuntimeError: if neither exists and the download fails.
    """
    downloaded = Path(download_to) / "FashionMNIST" / "raw"
    if (pairs := _find_both(Path(folder))) or (pairs := _find_both(downloaded)):
        return pairs
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(download_to), download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"Fashion-MNIST is not in {folder} and could not be downloaded to {downloaded} ({error}); "
            "run `apt-get install dataset-fashion-mnist`"
        ) from error
    if pairs := _find_both(downloaded):
        return pairs
    raise RuntimeError(
        f"the download left no idx files in {downloaded}; run `apt-get install dataset-fashion-mnist`"
    )


def _find_both(folder: Path) -> dict[str, IdxPair]:
    """Return both splits of ``folder``, or an empty dictionary."""
    found = {split: pair for split in _PREFIXES if (pair := find_split(folder, split))}
    return found if len(found) == len(_PREFIXES) else {}


def compile_fashion_mnist(
    out_dir: str | Path,
    pairs: dict[str, IdxPair],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[Path, Converted]:
    """Write ``fashion-mnist-train.beton`` and ``fashion-mnist-test.beton`` into ``out_dir``.

    Args:
        out_dir: folder for the sets.
        pairs: split → its idx files.
        workers: number of threads; None takes all cores.
        overwrite: replace existing sets.
        limit: number of training images to take; a sixth as many test images are taken, as in the whole set.
        progress: called once per image.

    Returns:
        Path of the set → result of its conversion.

    Raises:
        FileExistsError: before any work, if one of the sets exists and ``overwrite`` is off.
        ValueError: if a file of ``pairs`` is not a correct idx file.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    targets = {split: folder / f"fashion-mnist-{split}.beton" for split in pairs}
    if not overwrite and (there := [str(target) for target in targets.values() if target.exists()]):
        raise FileExistsError(
            f"{' and '.join(there)} exist already; choose another folder or add --overwrite"
        )
    outcome = {}
    for split, target in targets.items():
        source = IdxSource(pairs[split].images, pairs[split].labels)
        split_limit = limit if limit is None or split == "train" else max(1, limit // 6)
        work = Work(source, Normalising(tier="raw"), limit=split_limit, workers=workers, progress=progress)
        outcome[target] = convert_work(work, target, overwrite=overwrite)
    return outcome


# ------------------------------------------------------------------------------------------------------------
# Files


class IdxSource:
    """The grey images of a pair of idx files (the MNIST format), plain or gzipped, as RGB pixels."""

    def __init__(self, images: str | Path, labels: str | Path, *, classes: Sequence[str] = CLASSES) -> None:
        """Read both files. Raises ValueError if one is not an idx file or they do not match."""
        self._images = read_idx(images, num_dims=3)
        self._labels = read_idx(labels, num_dims=1)
        self._file, self._classes, self.passed_over = Path(images), tuple(classes), PassedOver()
        if len(self._images) != len(self._labels):
            raise ValueError(
                f"{images} holds {len(self._images)} images, {labels} {len(self._labels)} labels; "
                "give the two files of the same split"
            )
        if len(self._labels) and int(self._labels.max()) >= len(self._classes):
            raise ValueError(
                f"{labels} has the label {self._labels.max()}, but {len(self._classes)} classes are known; "
                "give the names of all classes"
            )

    @property
    def name(self) -> str:
        """Name of the file of images."""
        return self._file.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self._classes

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        """Return a hash of all images and labels."""
        return hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()

    def path(self, index: int) -> str:
        """Return ``file#index``."""
        return f"{self._file.name}#{index}"

    def read(self, index: int) -> Sample:
        """Return image ``index`` as (H, W, 3) uint8 with three equal channels."""
        grey = self._images[index]
        return Sample(np.repeat(grey[:, :, None], 3, axis=2), int(self._labels[index]), self.path(index))


def read_idx(path: str | Path, *, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped if its name ends in .gz.

    Raises:
        ValueError: if the magic number, the number of dimensions or the size is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the idx file {path} does not exist; fetch it")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    header = 4 + 4 * num_dims
    magic = bytes((0, 0, 8, num_dims))
    if len(content) < header or content[:4] != magic:
        raise ValueError(
            f"{path} starts with {content[:4].hex()}, but an idx file of {num_dims} dimensions "
            f"starts with {magic.hex()}; fetch it again"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", num_dims, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(
            f"{path} has {len(content)} bytes, its header {shape} requires {expected}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
