"""Fashion-MNIST, seventy thousand small pictures with real labels, as two compiled sets of the raw tier."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataset_tools.convert import Converted, convert
from dataset_tools.sources import IdxSource

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class IdxPair:
    """The two files of one split."""

    images: Path
    labels: Path


def find_split(folder: str | Path, split: str) -> IdxPair | None:
    """Return the idx files of ``split`` (train, test) in ``folder``, gzipped or plain; None without both."""
    if split not in _PREFIXES:
        raise ValueError(f"split is {split!r}; known are {', '.join(_PREFIXES)}")
    for suffix in (".gz", ""):
        stem = Path(folder) / _PREFIXES[split]
        pair = IdxPair(*(Path(f"{stem}-{kind}-ubyte{suffix}") for kind in ("images-idx3", "labels-idx1")))
        if pair.images.is_file() and pair.labels.is_file():
            return pair
    return None


def locate(download_to: str | Path = "data", *, folder: str | Path = DEBIAN_FOLDER) -> dict[str, IdxPair]:
    """Return the files of both splits: from ``folder``, else from torchvision's download in ``download_to``.

    Raises RuntimeError naming the mend where neither is there and the download fails.
    """
    downloaded = Path(download_to) / "FashionMNIST" / "raw"
    if (pairs := _both(Path(folder))) or (pairs := _both(downloaded)):
        return pairs
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(download_to), download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"Fashion-MNIST is not in {folder} and could not be downloaded to {downloaded} ({error}); "
            "run `apt-get install dataset-fashion-mnist`"
        ) from error
    if pairs := _both(downloaded):
        return pairs
    raise RuntimeError(
        f"the download left no idx files in {downloaded}; run `apt-get install dataset-fashion-mnist`"
    )


def _both(folder: Path) -> dict[str, IdxPair]:
    """Return both splits of ``folder``, or nothing."""
    found = {split: pair for split in _PREFIXES if (pair := find_split(folder, split))}
    return found if len(found) == len(_PREFIXES) else {}


def compile_fashion_mnist(
    out_dir: str | Path,
    pairs: dict[str, IdxPair],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[Path, Converted]:
    """Write ``fashion-mnist-train.beton`` and ``fashion-mnist-test.beton`` into ``out_dir``.

    ``limit`` takes only the first training pictures, and a sixth as many of the test set, as in the whole.
    ``progress`` is called once a picture. Raises FileExistsError, before any work, where one of the two
    exists and ``overwrite`` is off, and ValueError where a file of ``pairs`` is not what it should be.
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
        share = limit if limit is None or split == "train" else max(1, limit // 6)
        outcome[target] = convert(
            source, target, tier="raw", workers=workers, limit=share, overwrite=overwrite, progress=progress
        )
    return outcome
