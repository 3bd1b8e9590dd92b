"""The sub-commands that look at compiled sets: verify, stats, preview."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from dataset_tools.preview import preview
from dataset_tools.progress import track
from dataset_tools.report import NUM_NAMED, Stats
from dataset_tools.saying import line, pace
from dataset_tools.verify import count_pictures, stats, verify


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
    table = Table("", "", title=str(found.path), show_header=False)
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
        table.add_row(name, f"{count:,}", "█" * round(30 * count / max(ranked[0][1], 1)))
    return table
