"""The sub-commands of ``python -m dataset_tools``: each a dataclass of its options with a ``run``.

A new command is one more such class, and one more line in the table of ``__main__``.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import tyro
from rich.console import Console
from rich.table import Table

from dataset_tools.convert import Converted, convert, skipped_path
from dataset_tools.fashion_mnist import compile_fashion_mnist, locate
from dataset_tools.photographs import make_photographs
from dataset_tools.preview import preview
from dataset_tools.progress import track
from dataset_tools.sources import FolderSource
from dataset_tools.verify import NUM_NAMED, Stats, stats, verify
from pipelines.beton import ffcv_types, open_beton
from pipelines.manifest import Tier

_FASHION_MNIST_PICTURES = 70_000


class Command(Protocol):
    """One sub-command, its options as fields."""

    def run(self, out: Console, err: Console) -> int:
        """Do the work; results go to ``out``, progress bars to ``err``. Returns the exit code."""


@dataclass(frozen=True)
class Convert:
    """Compile a folder of pictures (a folder a class, or a flat one) into a .beton set."""

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """Folder of class folders, or flat folder of pictures."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUTPUT")]]
    """The .beton file to write."""
    workers: int | None = None
    """Threads; all cores by default."""
    tier: Tier = "jpeg"
    """jpeg: keep JPEG files as they are; yuv420: store decoded planes, fast to load, 1.5 bytes a pixel, best
    with --short-side; raw: store pixels, for tiny pictures."""
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
    """Take sub-folders as classes; --no-labels takes all pictures below SOURCE as unlabelled."""
    on_error: Literal["skip", "stop"] = "skip"
    """Leave out pictures that cannot be decoded, or stop at the first."""
    overwrite: bool = False
    """Replace OUTPUT where it exists."""

    def run(self, out: Console, err: Console) -> int:
        """Compile and report."""
        if self.output.exists() and not self.overwrite:
            raise FileExistsError(f"{self.output} exists already; choose another name or add --overwrite")
        source = FolderSource(self.source, labelled=self.labels)
        ffcv_types()  # takes seconds to import, which is not part of the pace
        self.output.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with track(len(source), "converting", err) as advance:
            converted = convert(
                source,
                self.output,
                tier=self.tier,
                workers=self.workers,
                quality=self.quality,
                max_side=self.max_side,
                short_side=self.short_side,
                recompress=self.recompress,
                verify=self.verify,
                on_error=self.on_error,
                overwrite=self.overwrite,
                progress=advance,
            )
        _report_replaced(self.output, converted, out)
        _say_done(self.output, converted, time.monotonic() - started, out)
        return 0


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
        done = "already complete" if made.already_there else _pace(total, time.monotonic() - started)
        next_step = f"python -m dataset_tools convert {made.root / 'train'} {made.root}-train.beton"
        _line(out, f"{made.root}: {mean}, {done}. Next: {next_step}")
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
        ffcv_types()
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


@dataclass(frozen=True)
class Verify:
    """Check a compiled set: tables, hash, every picture decoded. Exit code 1 where it is damaged."""

    path: tyro.conf.Positional[Path]
    """The .beton file."""
    workers: int | None = None
    """Threads; all cores by default."""

    def run(self, out: Console, err: Console) -> int:
        """Check and report."""
        total = _count(self.path)
        started = time.monotonic()
        with track(total, "verifying", err) as advance:
            report = verify(self.path, workers=self.workers, progress=advance)
        for problem in report.problems:
            _line(out, problem, style="red")
        for bad in report.bad[:NUM_NAMED]:
            _line(
                out,
                f"picture {bad.index} ({bad.source_path or 'source not recorded'}): {bad.reason}",
                style="red",
            )
        if len(report.bad) > NUM_NAMED:
            _line(out, f"… and {len(report.bad) - NUM_NAMED:,} more", style="red")
        if not report.ok:
            _line(out, f"{self.path} is damaged: {len(report.bad):,} of {report.count:,} pictures bad. "
                       "Next: compile it again, or look at the pictures named")  # fmt: skip
            return 1
        compared = (
            "as its manifest says" if report.has_manifest else "no manifest to compare the contents with"
        )
        pace = _pace(report.count, time.monotonic() - started)
        whole = f"{self.path} is whole, tier {report.tier}, {compared}"
        _line(out, f"{whole}: {pace}. Next: make pretrain DATA={self.path}")
        return 0


@dataclass(frozen=True)
class ShowStats:
    """Show what a compiled set holds: pictures, classes, sizes, bytes."""

    path: tyro.conf.Positional[Path]
    """The .beton file."""
    classes: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Classes to list, the largest first; 0 lists none."""

    def run(self, out: Console, err: Console) -> int:  # noqa: ARG002 – nothing here takes long
        """Print the tables."""
        found = stats(self.path)
        out.print(_overview(found))
        if self.classes > 0:
            out.print(_class_table(found, self.classes))
        _line(out, f"{self.path}: {found.count:,} pictures. Next: python -m dataset_tools verify {self.path}")
        return 0


@dataclass(frozen=True)
class Preview:
    """Draw a sheet of what the loader makes of a set: crops, views, masks, mixtures and their λ."""

    data: tyro.conf.Positional[Path]
    """A .beton file or a folder of pictures."""
    output: tyro.conf.Positional[Path]
    """The PNG to write."""
    rows: int = 6
    """Pictures on the sheet."""
    crop_px: int = 224
    """Side of the views."""
    grid_size: int = 8
    """Cells along a side of the mask."""
    seed: int = 0
    """Of the run whose first batch is shown."""

    def run(self, out: Console, err: Console) -> int:  # noqa: ARG002 – nothing here takes long
        """Draw the sheet."""
        path = preview(
            self.data,
            self.output,
            rows=self.rows,
            crop_px=self.crop_px,
            grid_size=self.grid_size,
            seed=self.seed,
        )
        _line(out, f"{path}: {self.rows} pictures. Next: make pretrain DATA={self.data}")
        return 0


def _count(path: Path) -> int:
    """Return the number of pictures, 0 where the tables are too damaged to tell."""
    try:
        return len(open_beton(path))
    except ValueError:
        return 0


def _report_replaced(path: Path, converted: Converted, out: Console) -> None:
    """Say what was encoded anew or left out, and name the first pictures left out."""
    for reason, count in converted.manifest.replaced.items():
        _line(out, f"{count:,} {reason}")
    for line in converted.skipped:
        _line(out, f"  {line}")
    if converted.num_skipped > len(converted.skipped):
        more = converted.num_skipped - len(converted.skipped)
        _line(out, f"  … and {more:,} more; all are in {skipped_path(path)}")


def _say_done(path: Path, converted: Converted, seconds: float, out: Console) -> None:
    manifest = converted.manifest
    size = f"{manifest.count:,} pictures, tier {manifest.tier}, {manifest.num_bytes / 1e6:,.1f} MB"
    _line(out, f"{path}: {size}, {_pace(manifest.count, seconds)}. Next: make pretrain DATA={path}")


def _pace(count: int, seconds: float) -> str:
    return f"{count:,} in {seconds:.1f} s ({count / max(seconds, 1e-9):,.0f}/s)"


def _line(out: Console, text: str, style: str | None = None) -> None:
    """Write one line as it is: no wrapping, no markup from file names."""
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _overview(found: Stats) -> Table:
    table = Table("", "", title=str(found.path), show_header=False)
    table.add_row("pictures", f"{found.count:,}")
    table.add_row("tier", found.tier)
    table.add_row("file", f"{found.num_bytes / 1e6:,.1f} MB, pages of {found.page_bytes / 2**20:g} MiB")
    table.add_row(
        "bytes a picture", f"mean {found.payload_bytes_mean:,.0f}, median {found.payload_bytes_median:,.0f}"
    )
    for name, (low, median, high) in (("width", found.width_px), ("height", found.height_px)):
        table.add_row(name, f"{low} … {high} px, median {median:g}")
    return table


def _class_table(found: Stats, limit: int) -> Table:
    """List the largest classes, each with a bar as long as its share of the largest."""
    ranked = sorted(found.per_class, key=lambda item: -item[1])
    title = f"{len(ranked):,} classes" + (f", the largest {limit}" if len(ranked) > limit else "")
    table = Table("class", "pictures", "", title=title)
    for name, count in ranked[:limit]:
        table.add_row(name, f"{count:,}", "█" * round(30 * count / max(ranked[0][1], 1)))
    return table
