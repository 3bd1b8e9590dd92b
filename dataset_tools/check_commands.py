"""The sub-commands on sets that are there: index, verify, stats, preview."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from dataset_tools.index_shards import index_shards, write_dali_indices
from dataset_tools.preview import preview
from dataset_tools.progress import count_up, track
from dataset_tools.report import NUM_NAMED, Stats
from dataset_tools.saying import line, pace, printable, report_left_out
from dataset_tools.verify import count_pictures, stats, verify
from dataset_tools.work import MAX_BAD
from pipelines.sets.manifest import skipped_path


@dataclass(frozen=True)
class Index:
    """Make a set of WebDataset shards that are there already: only indices are added, no tar is changed.

    A sample's picture is its jpg, png, webp … file; its label the number in its cls file, or "label" in json.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder that holds the .tar files."""
    ext: tuple[str, ...] = ()
    """Endings of the picture files, such as jpg png; by default that of the first sample."""
    labels: bool = True
    """Take labels from cls and json files; --no-labels takes all pictures as unlabelled."""
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Class names, one a line in the order of the labels; by default labels are called 0, 1, …."""
    max_bad: Annotated[float, tyro.conf.arg(metavar="SHARE")] = MAX_BAD
    """Leave out samples without a picture that can be read, up to this share of all."""
    accept_truncated: bool = False
    """Take the samples of a damaged tar that come before the place where it cannot be read on."""
    dali_only: bool = False
    """Write DALI's .idx files where they are missing or wrong, and nothing else."""
    workers: int | None = None
    """Tars read at once; all cores by default."""

    def run(self, out: Console, err: Console) -> int:
        """Index and report."""
        started = time.monotonic()
        with count_up("indexing tars", err) as advance:
            if self.dali_only:
                written = write_dali_indices(
                    self.path,
                    accept_truncated=self.accept_truncated,
                    workers=self.workers,
                    progress=advance,
                )
                line(out, f"{self.path}: {written} DALI indices written. "
                          f"Next: python -m dataset_tools verify {self.path}")  # fmt: skip
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
                progress=advance,
            )
        skipped = done.skipped
        report_left_out(skipped_path(self.path), done.manifest.replaced, skipped, len(skipped), out)
        if done.was_converted:
            line(out, "the set was converted here; its pictures are now numbered as they lie in the tars, no "
                      "longer as in their source")  # fmt: skip
        made = f"{done.manifest.count:,} pictures in {len(done.manifest.shards)} shards"
        speed = pace(done.manifest.count, time.monotonic() - started)
        line(out, f"{self.path}: {made}, {done.idx_written} DALI indices written, {speed}. "
                  f"Next: make pretrain DATA={self.path}")  # fmt: skip
        return 0


@dataclass(frozen=True)
class Verify:
    """Check a compiled set: tables, hashes, every picture decoded. Exit code 1 where it is damaged."""

    path: tyro.conf.Positional[Path]
    """The .beton file, or the folder of shards."""
    workers: int | None = None
    """Threads; all cores by default."""

    def run(self, out: Console, err: Console) -> int:
        """Check and report."""
        total = count_pictures(self.path)
        started = time.monotonic()
        with track(total, "verifying", err) as advance:
            report = verify(self.path, workers=self.workers, progress=advance)
        for problem in report.problems:
            line(out, problem, style="red")
        for bad in report.bad[:NUM_NAMED]:
            line(
                out,
                f"picture {bad.index} ({bad.source_path or 'source not recorded'}): {bad.reason}",
                style="red",
            )
        if len(report.bad) > NUM_NAMED:
            line(out, f"… and {len(report.bad) - NUM_NAMED:,} more", style="red")
        if not report.ok:
            line(out, f"{self.path} is damaged: {len(report.bad):,} of {report.count:,} pictures bad. "
                       "Next: mend what is named above, or compile it again")  # fmt: skip
            return 1
        compared = (
            "as its manifest says" if report.has_manifest else "no manifest to compare the contents with"
        )
        speed = pace(report.count, time.monotonic() - started)
        whole = f"{self.path} is whole, tier {report.tier}, {compared}"
        line(out, f"{whole}: {speed}. Next: make pretrain DATA={self.path}")
        return 0


@dataclass(frozen=True)
class ShowStats:
    """Show what a compiled set holds: pictures, classes, sizes, bytes."""

    path: tyro.conf.Positional[Path]
    """The .beton file, or the folder of shards."""
    classes: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Classes to list, the largest first; 0 lists none."""

    def run(self, out: Console, err: Console) -> int:  # noqa: ARG002 – nothing here takes long
        """Print the tables."""
        found = stats(self.path)
        out.print(_overview(found))
        if self.classes > 0:
            out.print(_class_table(found, self.classes))
        line(out, f"{self.path}: {found.count:,} pictures. Next: python -m dataset_tools verify {self.path}")
        return 0


@dataclass(frozen=True)
class Preview:
    """Draw a sheet of what the loader makes of a set: crops, views, masks, mixtures and their λ."""

    data: tyro.conf.Positional[Path]
    """A .beton file, a folder of shards, or a folder of pictures."""
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
        line(out, f"{path}: {self.rows} pictures. Next: make pretrain DATA={self.data}")
        return 0


def _overview(found: Stats) -> Table:
    table = Table("", "", title=printable(str(found.path)), show_header=False)
    table.add_row("pictures", f"{found.count:,}")
    table.add_row("tier", found.tier)
    table.add_row("stored in", f"{found.num_bytes / 1e6:,.1f} MB, {found.layout}")
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
        table.add_row(printable(name), f"{count:,}", "█" * round(30 * count / max(ranked[0][1], 1)))
    return table
