"""The sub-commands of ``python -m dataset_tools`` that make sets: each a dataclass of its options.

A new command is one more such class, and one more line in the table of ``__main__``.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import tyro
from rich.console import Console

from dataset_tools.convert import Converted, Sharding, compile_set, make_shards
from dataset_tools.fashion_mnist import compile_fashion_mnist, locate
from dataset_tools.normalise import Normalising
from dataset_tools.open_source import open_source
from dataset_tools.photographs import make_photographs
from dataset_tools.progress import Advance, count_up, track
from dataset_tools.saying import line, pace, report_left_out
from dataset_tools.shard_plan import DEFAULT_SHARD_SIZE
from dataset_tools.shard_set import SUFFIX
from dataset_tools.sources import Source
from dataset_tools.work import MAX_BAD, Work
from pipelines.sets.manifest import Tier, skipped_path

_FASHION_MNIST_PICTURES = 70_000


class Command(Protocol):
    """One sub-command, its options as fields."""

    def run(self, out: Console, err: Console) -> int:
        """Do the work; results go to ``out``, progress bars to ``err``. Returns the exit code."""


@dataclass(frozen=True)
class Convert:
    """Compile pictures into a .beton file or, where OUTPUT ends in .shards, into a folder of shards.

    SOURCE is a folder of class folders, or a flat one; a tar of pictures, or of one tar per class as ImageNet
    is downloaded, which is not unpacked; or a set of shards. Shards are made in parts that are whole or
    absent: the same command again goes on where it was stopped, and several machines can share the work with
    --shards.
    """

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """Folder or .tar of pictures, or set of shards."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUTPUT")]]
    """The .beton file to write, or the .shards folder."""
    workers: int | None = None
    """Threads; all cores by default."""
    tier: Tier = "jpeg"
    """jpeg: keep JPEG files as they are; yuv420: store decoded planes, fast to load, 1.5 bytes a pixel, best
    with --short-side; raw: store pixels, for tiny pictures. Shards are always jpeg."""
    quality: int = 95
    """JPEG quality of pictures that must be encoded anew."""
    max_side: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Reduce pictures to this longer side in px; by default sizes stay, and none is ever enlarged."""
    short_side: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Reduce pictures to this shorter side in px, instead of --max-side."""
    recompress: bool = False
    """Encode every JPEG anew at --quality, even one that could stay as it is."""
    verify: bool = True
    """Decode every JPEG once to find cut and corrupt ones."""
    labels: bool = True
    """Take folders as classes; --no-labels takes all pictures of SOURCE as unlabelled."""
    labels_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Class names, one a line in the order of the sorted pictures, for a tar without class folders."""
    max_bad: Annotated[float, tyro.conf.arg(metavar="SHARE")] = MAX_BAD
    """Leave out pictures that cannot be decoded, up to this share of all; 0 stops at the first."""
    accept_truncated: bool = False
    """Take the pictures of a damaged tar that come before the place where it cannot be read on."""
    shard_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Pictures a shard; 2000 by default."""
    seed: int | None = None
    """Of the order of the pictures in the shards, in which they are shuffled once; 0 by default."""
    shards: Annotated[str | None, tyro.conf.arg(metavar="A:B")] = None
    """Make only the shards A … B − 1; once all are there, the command without this option ends the set."""
    overwrite: bool = False
    """Replace OUTPUT where it exists, once the new set is whole. Stopped before, it begins anew."""

    def run(self, out: Console, err: Console) -> int:
        """Compile and report."""
        sharding = self._sharding()
        if sharding is None and self.output.exists() and not self.overwrite:
            raise FileExistsError(f"{self.output} exists already; choose another name or add --overwrite")
        with count_up("reading names", err) as advance:
            source = open_source(
                self.source,
                labelled=self.labels,
                labels_file=self.labels_file,
                accept_truncated=self.accept_truncated,
                progress=advance,
            )
        if sharding is None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
        replaces = self.overwrite and self.output.exists()
        started = time.monotonic()
        try:
            with track(len(source), "converting", err) as advance:
                work = self._work(source, advance)
                if sharding is not None and not _covers_all(sharding, source):
                    return self._make_some(work, sharding, out)
                every = sharding and replace(sharding, shards=None)
                converted = compile_set(work, self.output, sharding=every, overwrite=self.overwrite)
        except KeyboardInterrupt:
            if sharding is None or replaces:
                raise
            raise KeyboardInterrupt("whole shards are kept; the same command goes on from there") from None
        if converted.already_there:
            num_shards = len(converted.manifest.shards)
            told = f"{converted.manifest.count:,} pictures in {num_shards} shards, already complete"
            line(out, f"{self.output}: {told}. Next: make pretrain DATA={self.output}")
            return 0
        _report_replaced(self.output, converted, out)
        _say_done(self.output, converted, time.monotonic() - started, out)
        return 0

    def _sharding(self) -> Sharding | None:
        """What is asked of shards; None for a .beton file."""
        if self.shards is not None and self.overwrite:
            raise ValueError(
                f"--shards {self.shards} shares the work on {self.output}, and --overwrite would remove what "
                "others have made; remove the folder by hand, once"
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
            None if self.shards is None else _range(self.shards),
        )

    def _work(self, source: Source, advance: Advance) -> Work:
        how = Normalising(
            self.tier, self.quality, self.max_side, self.short_side, self.recompress, self.verify
        )
        return Work(source, how, self.max_bad, workers=self.workers, progress=advance)

    def _make_some(self, work: Work, sharding: Sharding, out: Console) -> int:
        done = make_shards(work, self.output, sharding)
        told = f"{done.made} shards made, {done.asked - done.made} were whole, the set has {done.num_shards}"
        line(out, f"{self.output}: {told}. Next: when all are here, the same command without --shards")
        return 0


def _range(text: str) -> tuple[int, int]:
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise ValueError(f"--shards is {text!r}; give the first and the one after the last, such as 0:100")
    return int(first), int(stop)


def _covers_all(sharding: Sharding, source: Source) -> bool:
    return sharding.shards is None or sharding.shards == (0, -(-len(source) // sharding.shard_size))


@dataclass(frozen=True)
class Photographs:
    """Make the sample set: ImageNet-like JPEGs cut from photographs inside installed packages."""

    output: tyro.conf.Positional[Path]
    """Folder to make, with train and val below it."""
    count: int = 2000
    """Pictures in train."""
    val: int = 200
    """Pictures in val."""
    seed: int = 0
    """The same seed gives the same pictures."""
    workers: int | None = None
    """Threads; all cores by default."""
    overwrite: bool = False
    """Replace a sample set made with other options."""

    def run(self, out: Console, err: Console) -> int:
        """Make the set and report."""
        started = time.monotonic()
        with track(self.count + self.val, "making photographs", err) as advance:
            made = make_photographs(
                self.output,
                count=self.count,
                val=self.val,
                seed=self.seed,
                workers=self.workers,
                overwrite=self.overwrite,
                progress=advance,
            )
        total = sum(made.counts)
        mean = f"{total:,} pictures, {made.num_bytes / total / 1e3:.0f} KB on average"
        done = "already complete" if made.already_there else pace(total, time.monotonic() - started)
        next_step = f"python -m dataset_tools convert {made.root / 'train'} {made.root}-train.beton"
        line(out, f"{made.root}: {mean}, {done}. Next: {next_step}")
        return 0


@dataclass(frozen=True)
class FashionMnist:
    """Compile Fashion-MNIST, from Debian's package or a download, into two sets of the raw tier."""

    output: tyro.conf.Positional[Path]
    """Folder for fashion-mnist-train.beton and fashion-mnist-test.beton."""
    download_to: Path = Path("data")
    """Where torchvision downloads the files when Debian's package is not installed."""
    workers: int | None = None
    """Threads; all cores by default."""
    limit: int | None = None
    """Take only this many pictures of the training set, and a sixth as many of the test set."""
    overwrite: bool = False
    """Replace the sets where they exist."""

    def run(self, out: Console, err: Console) -> int:
        """Compile both splits and report."""
        pairs = locate(self.download_to)
        started = time.monotonic()
        expected = _FASHION_MNIST_PICTURES if self.limit is None else self.limit + self.limit // 6
        with track(expected, "compiling Fashion-MNIST", err) as advance:
            outcome = compile_fashion_mnist(
                self.output,
                pairs,
                workers=self.workers,
                limit=self.limit,
                overwrite=self.overwrite,
                progress=advance,
            )
        seconds = time.monotonic() - started
        total = sum(converted.manifest.count for converted in outcome.values())
        for path, converted in outcome.items():
            _say_done(path, converted, seconds * converted.manifest.count / total, out)
        return 0


def _report_replaced(path: Path, converted: Converted, out: Console) -> None:
    """Say what was encoded anew or left out, and name the first pictures left out."""
    manifest = converted.manifest
    report_left_out(skipped_path(path), manifest.replaced, converted.skipped, converted.num_skipped, out)


def _say_done(path: Path, converted: Converted, seconds: float, out: Console) -> None:
    manifest = converted.manifest
    listed = f" of {manifest.count + converted.num_skipped:,} listed" if converted.num_skipped else ""
    size = f"{manifest.count:,} pictures{listed}, tier {manifest.tier}, {manifest.num_bytes / 1e6:,.1f} MB"
    shards = f" in {len(manifest.shards)} shards" if manifest.shards else ""
    line(out, f"{path}: {size}{shards}, {pace(manifest.count, seconds)}. Next: make pretrain DATA={path}")
