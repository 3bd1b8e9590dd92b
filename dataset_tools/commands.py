"""The sub-commands of ``python -m dataset_tools`` that make sets. Each is a dataclass of its options.

To add a command, add a class here and a line to ``COMMANDS`` in ``__main__``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from dataset_tools.convert import Converted, Sharding, convert_work, make_shards
from dataset_tools.fashion_mnist import compile_fashion_mnist, locate
from dataset_tools.normalise import Normalising
from dataset_tools.photographs import make_photographs
from dataset_tools.shard_plan import DEFAULT_SHARD_SIZE
from dataset_tools.shard_set import SUFFIX, unfinished
from dataset_tools.sources import FolderSource, ShardSource, Source
from dataset_tools.tar_source import TarSource
from dataset_tools.terminal import count_up, pace, print_left_out, print_line, track
from dataset_tools.work import MAX_BAD, Progress, Work
from pipelines.sets.manifest import Tier, skipped_path
from pipelines.sets.shards import index_hint, is_shard_set

_FASHION_MNIST_IMAGES = 70_000
_TAR_SUFFIXES = (".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")
"""Suffixes of files that are opened as tars. For a compressed one, the error says how to unpack it."""


class Command(Protocol):
    """One sub-command, with its options as fields."""

    def run(self) -> int:
        """Do the work, print the results, and return the exit code."""


@dataclass(frozen=True)
class Convert:
    """Compile images into a .beton file or, if OUTPUT ends in .shards, into a folder of shards.

    SOURCE is a folder of class folders or a flat folder; a tar of images, or a tar of one tar per class, such
    as ImageNet's download; or a set of shards. Tars are not unpacked. A stopped conversion to shards keeps
    its complete shards, and the same command continues it. Several machines can share the work with --shards.
    """

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """Folder or .tar of images, or set of shards."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUTPUT")]]
    """The .beton file to write, or the .shards folder."""
    workers: int | None = None
    """Threads; all cores by default."""
    tier: Tier = "jpeg"
    """jpeg: keep JPEG files as they are. yuv420: store decoded planes, fast to load, 1.5 bytes per pixel,
    best with --short-side. raw: store pixels, for tiny images. Shards are always jpeg."""
    quality: int = 95
    """JPEG quality of images that must be encoded again."""
    max_side: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Reduce images to this longer side in px; by default sizes stay. Images are never enlarged."""
    short_side: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Reduce images to this shorter side in px, instead of --max-side."""
    recompress: bool = False
    """Encode every JPEG again at --quality, even one that could stay as it is."""
    verify: bool = True
    """Decode every JPEG once to find truncated and damaged ones."""
    labels: bool = True
    """Take folders as classes; --no-labels treats all images of SOURCE as unlabelled."""
    labels_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Class names, one per line in the order of the sorted images, for a tar without class folders."""
    max_bad: Annotated[float, tyro.conf.arg(metavar="SHARE")] = MAX_BAD
    """Leave out images that cannot be decoded, up to this share of all; 0 stops at the first."""
    accept_truncated: bool = False
    """Take the images of a damaged tar up to the place where it cannot be read any further."""
    shard_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images per shard; 2000 by default."""
    seed: int | None = None
    """Seed of the order of the images in the shards, 0 by default. They are shuffled once."""
    shards: Annotated[str | None, tyro.conf.arg(metavar="A:B")] = None
    """Make only the shards A … B − 1. When all exist, the command without this option finishes the set."""
    overwrite: bool = False
    """Replace an existing OUTPUT when the new set is complete. A stopped replacement starts again."""

    def run(self) -> int:
        """Compile the set and report."""
        sharding = self._sharding()
        if sharding is None and self.output.exists() and not self.overwrite:
            raise FileExistsError(f"{self.output} exists already; choose another name or add --overwrite")
        with count_up("reading names") as progress:
            source = open_source(
                self.source,
                labelled=self.labels,
                labels_file=self.labels_file,
                accept_truncated=self.accept_truncated,
                progress=progress,
            )
        if sharding is None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
        replaces = self.overwrite and self.output.exists()
        started = time.monotonic()
        try:
            with track(len(source), "converting") as progress:
                work = self._work(source, progress)
                if sharding is not None and not _covers_all(sharding, source):
                    return self._make_some_shards(work, sharding)
                every = sharding and replace(sharding, shards=None)
                converted = convert_work(work, self.output, sharding=every, overwrite=self.overwrite)
        except KeyboardInterrupt:
            if sharding is None or replaces:
                raise
            raise KeyboardInterrupt("complete shards are kept; run the same command to continue") from None
        _report(self.output, converted, time.monotonic() - started)
        return 0

    def _sharding(self) -> Sharding | None:
        """The options of shards; None for a .beton file."""
        if self.shards is not None and self.overwrite:
            raise ValueError(
                f"--shards {self.shards} makes a part of {self.output}, and --overwrite would remove the "
                "other parts; remove the folder by hand, once"
            )
        if self.output.suffix != SUFFIX:
            options = {"--shard-size": self.shard_size, "--seed": self.seed, "--shards": self.shards}
            for option, value in options.items():
                if value is not None:
                    name = self.output.with_suffix(SUFFIX)
                    raise ValueError(f"{option} is for shards; name the output {name}")
            return None
        return Sharding(
            DEFAULT_SHARD_SIZE if self.shard_size is None else self.shard_size,
            self.seed or 0,
            None if self.shards is None else _shard_range(self.shards),
        )

    def _work(self, source: Source, progress: Progress) -> Work:
        how = Normalising(
            self.tier, self.quality, self.max_side, self.short_side, self.recompress, self.verify
        )
        return Work(source, how, self.max_bad, workers=self.workers, progress=progress)

    def _make_some_shards(self, work: Work, sharding: Sharding) -> int:
        done = make_shards(work, self.output, sharding)
        complete = done.requested - done.made
        counts = f"{done.made} shards made, {complete} were complete, the set has {done.num_shards}"
        print_line(f"{self.output}: {counts}. Next: when all exist, the same command without --shards")
        return 0


def open_source(
    path: Path,
    *,
    labelled: bool = True,
    labels_file: Path | None = None,
    accept_truncated: bool = False,
    progress: Callable[[], None] | None = None,
) -> Source:
    """Open a folder of images, a tar of images or of tars, or a set of shards.

    Args:
        path: the folder or file.
        labelled: False treats the images of a folder or a tar as unlabelled.
        labels_file: for tars, see TarSource.
        accept_truncated: take what can be read of a damaged tar or set of shards.
        progress: called once per image of a tar and once per shard.

    Raises:
        ValueError: if ``path`` is anything else or an option does not apply to it; also as the classes of the
            sources do.
    """
    if labels_file is not None and not path.is_file():
        raise ValueError(f"the labels in {labels_file} are for a tar of images, and {path} is not a tar")
    if path.is_file():
        if path.suffix.lower() not in _TAR_SUFFIXES:
            raise ValueError(
                f"the source {path} is a file but not a .tar; give a folder of images, a tar of images "
                "or a set of shards"
            )
        return TarSource(
            path,
            labelled=labelled,
            labels_file=labels_file,
            accept_truncated=accept_truncated,
            progress=progress,
        )
    if is_shard_set(path):
        if not labelled:
            raise ValueError(f"{path} is a set of shards, and its labels cannot be left out")
        return ShardSource(path, accept_truncated=accept_truncated, progress=progress)
    if accept_truncated:
        raise ValueError(
            f"--accept-truncated is for damaged tars; {path} is neither a tar nor a set of shards"
        )
    if path.is_dir():
        if sentence := unfinished(path):
            raise ValueError(sentence)
        if (tar := next(path.glob("*.tar"), None)) and not any(entry.is_dir() for entry in path.iterdir()):
            raise ValueError(f"{path} holds tars (such as {tar.name}) without an index; {index_hint(path)}")
    return FolderSource(path, labelled=labelled)


def _shard_range(text: str) -> tuple[int, int]:
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise ValueError(
            f"--shards is {text!r}; give the first shard and the one after the last, such as 0:100"
        )
    return int(first), int(stop)


def _covers_all(sharding: Sharding, source: Source) -> bool:
    return sharding.shards is None or sharding.shards == (0, -(-len(source) // sharding.shard_size))


@dataclass(frozen=True)
class Photographs:
    """Make the sample set: ImageNet-like JPEGs cut from photographs inside installed packages."""

    output: tyro.conf.Positional[Path]
    """Folder to make, with the folders train and val in it."""
    count: int = 2000
    """Images in train."""
    val: int = 200
    """Images in val."""
    seed: int = 0
    """The same seed gives the same images."""
    workers: int | None = None
    """Threads; all cores by default."""
    overwrite: bool = False
    """Replace a sample set made with other options."""

    def run(self) -> int:
        """Make the set and report."""
        started = time.monotonic()
        with track(self.count + self.val, "making photographs") as progress:
            made = make_photographs(
                self.output,
                count=self.count,
                val=self.val,
                seed=self.seed,
                workers=self.workers,
                overwrite=self.overwrite,
                progress=progress,
            )
        total = sum(made.counts)
        mean = f"{total:,} images, {made.num_bytes / total / 1e3:.0f} KB on average"
        done = "already complete" if made.already_there else pace(total, time.monotonic() - started)
        next_step = f"python -m dataset_tools convert {made.root / 'train'} {made.root}-train.beton"
        print_line(f"{made.root}: {mean}, {done}. Next: {next_step}")
        return 0


@dataclass(frozen=True)
class FashionMnist:
    """Compile Fashion-MNIST, from Debian's package or a download, into two sets of the raw tier."""

    output: tyro.conf.Positional[Path]
    """Folder for fashion-mnist-train.beton and fashion-mnist-test.beton."""
    download_to: Path = Path("data")
    """Folder into which torchvision downloads the files if Debian's package is not installed."""
    workers: int | None = None
    """Threads; all cores by default."""
    limit: int | None = None
    """Take only this number of training images, and a sixth as many test images."""
    overwrite: bool = False
    """Replace existing sets."""

    def run(self) -> int:
        """Compile both splits and report."""
        pairs = locate(self.download_to)
        started = time.monotonic()
        expected = _FASHION_MNIST_IMAGES if self.limit is None else self.limit + self.limit // 6
        with track(expected, "compiling Fashion-MNIST") as progress:
            outcome = compile_fashion_mnist(
                self.output,
                pairs,
                workers=self.workers,
                limit=self.limit,
                overwrite=self.overwrite,
                progress=progress,
            )
        seconds = time.monotonic() - started
        total = sum(converted.manifest.count for converted in outcome.values())
        for path, converted in outcome.items():
            _report(path, converted, seconds * converted.manifest.count / total)
        return 0


def _report(path: Path, converted: Converted, seconds: float) -> None:
    """Print the result of a conversion and the next command."""
    manifest = converted.manifest
    num_shards = len(manifest.shards)
    next_step = f"Next: make pretrain DATA={path}"
    if converted.already_there:
        print_line(f"{path}: {manifest.count:,} images in {num_shards} shards, already complete. {next_step}")
        return
    print_left_out(skipped_path(path), manifest.replaced, converted.skipped, converted.num_skipped)
    listed = f" of {manifest.count + converted.num_skipped:,} listed" if converted.num_skipped else ""
    size = f"{manifest.count:,} images{listed}, tier {manifest.tier}, {manifest.num_bytes / 1e6:,.1f} MB"
    shards = f" in {num_shards} shards" if num_shards else ""
    print_line(f"{path}: {size}{shards}, {pace(manifest.count, seconds)}. {next_step}")
