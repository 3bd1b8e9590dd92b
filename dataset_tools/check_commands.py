"""The sub-commands for existing sets: index, verify, stats, preview."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from dataset_tools.index_shards import index_shards, write_dali_indices
from dataset_tools.preview import preview
from dataset_tools.stats import Stats, count_images, stats
from dataset_tools.terminal import count_up, pace, print_left_out, print_line, printable, track
from dataset_tools.verify import verify
from dataset_tools.work import MAX_BAD, NUM_NAMED
from pipelines.sets.manifest import skipped_path
from training.cli import console


@dataclass(frozen=True)
class Index:
    """Make a set from existing WebDataset shards: adds indices and changes no tar.

    A sample's image is its jpg, png, webp … file. Its label is the number in its cls file, or "label" in
    its json file.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder that holds the .tar files."""
    ext: tuple[str, ...] = ()
    """Suffixes of the image files, such as jpg png; by default the suffix of the first sample's image."""
    labels: bool = True
    """Take labels from cls and json files; --no-labels treats all images as unlabelled."""
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Class names, one per line in label order; by default the names are 0, 1, …."""
    max_bad: Annotated[float, tyro.conf.arg(metavar="SHARE")] = MAX_BAD
    """Leave out samples without a readable image, up to this share of all samples."""
    accept_truncated: bool = False
    """Take the samples of a damaged tar up to the place where it cannot be read any further."""
    dali_only: bool = False
    """Write DALI's .idx files where they are missing or wrong, and nothing else."""
    workers: int | None = None
    """Tars read at the same time; all cores by default."""

    def run(self) -> int:
        """Index and report."""
        started = time.monotonic()
        with count_up("indexing tars") as progress:
            if self.dali_only:
                written = write_dali_indices(
                    self.path,
                    accept_truncated=self.accept_truncated,
                    workers=self.workers,
                    progress=progress,
                )
                next_step = f"Next: python -m dataset_tools verify {self.path}"
                print_line(f"{self.path}: {written} DALI indices written. {next_step}")
                return 0
            names = None if self.classes is None else self.classes.read_text(encoding="utf-8").splitlines()
            done = index_shards(
                self.path,
                labelled=self.labels,
                classes=names,
                extensions=self.ext,
                max_bad=self.max_bad,
                accept_truncated=self.accept_truncated,
                workers=self.workers,
                progress=progress,
            )
        print_left_out(skipped_path(self.path), done.manifest.replaced, done.skipped, len(done.skipped))
        if done.was_converted:
            print_line(
                "this set was made by a conversion; its images are now numbered in the order of the tars, "
                "no longer in the order of their source"
            )
        count = done.manifest.count
        made = f"{count:,} images in {len(done.manifest.shards)} shards"
        made += f", {done.idx_written} DALI indices written, {pace(count, time.monotonic() - started)}"
        print_line(f"{self.path}: {made}. Next: make pretrain DATA={self.path}")
        return 0


@dataclass(frozen=True)
class Verify:
    """Check a compiled set: tables, hashes, every image by decoding it. Exit code 1 if it is damaged."""

    path: tyro.conf.Positional[Path]
    """The .beton file, or the folder of shards."""
    workers: int | None = None
    """Threads; all cores by default."""

    def run(self) -> int:
        """Check and report."""
        total = count_images(self.path)
        started = time.monotonic()
        with track(total, "verifying") as progress:
            report = verify(self.path, workers=self.workers, progress=progress)
        for problem in report.problems:
            print_line(problem, style="red")
        for bad in report.bad[:NUM_NAMED]:
            source = bad.source_path or "source not recorded"
            print_line(f"image {bad.index} ({source}): {bad.reason}", style="red")
        if len(report.bad) > NUM_NAMED:
            print_line(f"… and {len(report.bad) - NUM_NAMED:,} more", style="red")
        if not report.ok:
            bad_images = f"{len(report.bad):,} of {report.count:,} images bad"
            next_step = "repair what is listed above, or compile the set again"
            print_line(f"{self.path} is damaged: {bad_images}. Next: {next_step}")
            return 1
        compared = "matches its manifest" if report.has_manifest else "without a manifest to compare it with"
        speed = pace(report.count, time.monotonic() - started)
        undamaged = f"{self.path} is undamaged, tier {report.tier}, {compared}"
        print_line(f"{undamaged}: {speed}. Next: make pretrain DATA={self.path}")
        return 0


@dataclass(frozen=True)
class ShowStats:
    """Show what a compiled set holds: images, classes, sizes, bytes."""

    path: tyro.conf.Positional[Path]
    """The .beton file, or the folder of shards."""
    classes: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Number of classes to list, the largest first; 0 lists none."""

    def run(self) -> int:
        """Print the tables."""
        found = stats(self.path)
        console.print(_overview(found), soft_wrap=False)
        if self.classes > 0:
            console.print(_class_table(found, self.classes), soft_wrap=False)
        next_step = f"python -m dataset_tools verify {self.path}"
        print_line(f"{self.path}: {found.count:,} images. Next: {next_step}")
        return 0


@dataclass(frozen=True)
class Preview:
    """Draw a sheet of what the loader makes of a set: crops, views, masks, mixtures and their λ."""

    data: tyro.conf.Positional[Path]
    """A .beton file, a folder of shards, or a folder of images."""
    output: tyro.conf.Positional[Path]
    """The PNG to write."""
    rows: int = 6
    """Images on the sheet."""
    crop_px: int = 224
    """Side of the views."""
    grid_size: int = 8
    """Cells along a side of the mask."""
    seed: int = 0
    """Seed of the run; its first batch is shown."""

    def run(self) -> int:
        """Draw the sheet."""
        path = preview(
            self.data,
            self.output,
            rows=self.rows,
            crop_px=self.crop_px,
            grid_size=self.grid_size,
            seed=self.seed,
        )
        print_line(f"{path}: {self.rows} images. Next: make pretrain DATA={self.data}")
        return 0


def _overview(found: Stats) -> Table:
    table = Table("", "", title=printable(str(found.path)), show_header=False)
    table.add_row("images", f"{found.count:,}")
    table.add_row("tier", found.tier)
    table.add_row("stored in", f"{found.num_bytes / 1e6:,.1f} MB, {found.layout}")
    table.add_row(
        "bytes per image", f"mean {found.payload_bytes_mean:,.0f}, median {found.payload_bytes_median:,.0f}"
    )
    for name, (low, median, high) in (("width", found.width_px), ("height", found.height_px)):
        table.add_row(name, f"{low} … {high} px, median {median:g}")
    return table


def _class_table(found: Stats, limit: int) -> Table:
    """List the largest classes, each with a bar of its share of the largest."""
    ranked = sorted(found.per_class, key=lambda item: -item[1])
    title = f"{len(ranked):,} classes" + (f", the largest {limit}" if len(ranked) > limit else "")
    table = Table("class", "images", "", title=title)
    for name, count in ranked[:limit]:
        table.add_row(printable(name), f"{count:,}", "█" * round(30 * count / max(ranked[0][1], 1)))
    return table
