"""Describe what is in a shard set: tables for a terminal, describe.md, a figure for a paper, sizes.png, and remarks.csv.

The set need not be finished; its tars, torch and DALI are not needed. Nothing is written into the set.
"""

import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from cxrfast.errors import ShardError
from cxrfast.files import write_bytes, write_figure
from cxrfast.shards.building.cautions import by_remark, rows_in_words
from cxrfast.shards.upkeep.counts import COUNTED, STATES, SetCounts, count_set
from cxrfast.shards.upkeep.kept_counts import kept_tables
from cxrfast.splits import FOLDS
from cxrfast.tables import Table, markdown_text
from cxrfast.units import size


@dataclass(frozen=True, kw_only=True)
class Description:
    heading: str
    """The set in one line."""
    cautions: list[str]
    """What to know about the rows before training on them."""
    tables: list[Table]
    written: list[Path]
    """describe.md; if a size is known, sizes.png; if there are remarks on images, remarks.csv."""


def describe(folder: Path, out: Path, show: Collection[str] = ()) -> Description:
    """Write the description of a set to the folder `out`.

    `show`: kept columns to tabulate although they may identify patients. Raises ShardError for a damaged set, if `out` is
    inside it, and for a column that was not kept.
    """
    counts = count_set(folder)
    tables = description_tables(counts, show)
    written = write(counts, folder, out, show)
    return Description(heading=heading(counts), cautions=counts.cautions, tables=tables, written=written)


# Tables


def description_tables(counts: SetCounts, show: Collection[str] = ()) -> list[Table]:
    """Tables for a terminal of 100 columns or more; `show`: kept columns that are tabulated in any case."""
    parts = [_splits(counts), *([_labels(counts)] if counts.info.labels else [])]
    parts += [_flow(counts), _sizes(counts), _scales(counts), _views(counts)]
    parts += kept_tables(counts.kept, show)
    parts += [_remarks(counts)] if len(counts.remarks) else []
    return parts + ([_references(counts)] if len(counts.references) else [])


def _numbers(line: pd.Series, names: tuple[str, ...] = COUNTED) -> list[str]:
    return [f"{line[name]:,}" for name in names]


def _splits(counts: SetCounts) -> Table:
    lines = [["all", *_numbers(counts.flow.iloc[0])]]
    lines += [[f"official {line['split']}", *_numbers(line)] for _, line in counts.splits.iterrows()]
    lines += [[f"fold {line['fold']}", *_numbers(line)] for _, line in counts.folds.query("part == 'test'").iterrows()]
    how = "the source's own" if counts.info.own_folds else f"assigned by patient, seed {counts.info.seed}"
    note = f"Fold k is the test part of training k. Folds are {how}."
    return Table(
        title="Images, studies and patients", head=["Part", "Images", "Studies", "Patients"], rows=lines, note=note
    )


def _labels(counts: SetCounts) -> Table:
    wide = counts.labels.pivot(index="label", columns="fold", values="positive")
    total = counts.labels.query("fold == -1")
    lines = [
        [line["label"], *_numbers(line, (*STATES, "blank")), *(f"{wide.loc[line['label'], k]:,}" for k in range(FOLDS))]
        for _, line in total.iterrows()
    ]
    head = ["Finding", "Positive", "Negative", "Uncertain", "Blank", *(f"fold {k}" for k in range(FOLDS))]
    note = "Fold 0 to 4: positives in that fold. All listed images are counted; images of a study share its labels."
    return Table(title=f"Labels of {counts.info.images:,} images", head=head, rows=lines, note=note)


def _flow(counts: SetCounts) -> Table:
    lines: list[list[str]] = []
    before = counts.info.images
    for _, line in counts.flow.iterrows():
        lines.append([line["step"], *_numbers(line), f"{before - line['images']:,}" if lines else ""])
        before = line["images"]
        if line["step"] == "readable":
            lines += [
                [f"  of these {reason}", "", "", "", f"{images:,}"]
                for reason, images in counts.reasons.itertuples(index=False)
            ]
    lines += [[f"  {line['part']} of fold 0", *_numbers(line), ""] for _, line in counts.parts.iterrows()]
    return Table(
        title="From the tables to training",
        head=["Images that are", "Images", "Studies", "Patients", "Left out"],
        rows=lines,
        note="" if counts.state == "complete" else f"{counts.state[0].upper()}{counts.state[1:]}.",
    )


def _sizes(counts: SetCounts, shown: int = 10) -> Table:
    images = counts.sizes["images"].sum()
    lines = [
        [f"{line['height']:,} × {line['width']:,}", f"{line['images']:,}", f"{100 * line['images'] / images:.1f}"]
        for _, line in counts.sizes.head(shown).iterrows()
    ]
    if len(rest := counts.sizes.iloc[shown:]):
        n = rest["images"].sum()
        lines.append([f"{len(rest):,} other sizes", f"{n:,}", f"{100 * n / images:.1f}"])
    return Table(
        title="Sizes of the images", head=["Height × width, px", "Images", "%"], rows=lines, note=size_note(counts)
    )


def size_note(counts: SetCounts) -> str:
    """Where the sizes come from."""
    claimed = int(counts.sizes["images"].sum()) - counts.decoded
    known = [(counts.decoded, "as decoded"), (claimed, "as the source's tables say"), (counts.unknown, "unknown")]
    text = "; ".join(f"{n:,} images {what}" for n, what in known if n)
    return f"{text}." + (
        f" The tables give another size for {counts.differing:,} of those decoded." if counts.differing else ""
    )


def _scales(counts: SetCounts) -> Table:
    lines = [
        [
            f"{line['scale']:.0f} px",
            f"{line['shards']:,.0f} of {counts.info.shards:,}",
            f"{line['rows']:,.0f}",
            size(line["bytes"]),
            f"{line['files']:,.0f}",
            "-" if np.isnan(line["kB_per_image"]) else f"{line['kB_per_image']:,.1f}",
        ]
        for line in counts.scales.astype(float).to_dict("records")
    ]
    head = ["Scale", "Shards", "Rows", "Tars", "Files", "kB per image"]
    info = counts.info
    codec = "Raw (PGM)" if info.codec == "raw" else f"JPEG, quality {info.quality}, {info.dct} DCT"
    note = f"{codec}, {counts.info.resize}; 1 kB = 1,000 bytes, labels and padding included."
    return Table(title="Shards", head=head, rows=lines, note=note)


def _views(counts: SetCounts) -> Table:
    lines = [[str(line["view"]), *_numbers(line)] for _, line in counts.views.iterrows()]
    return Table(title="Views", head=["View", "Images", "Studies", "Patients"], rows=lines)


def _remarks(counts: SetCounts) -> Table:
    rows, remarks = (counts.remarks[name].tolist() for name in ("row", "remark"))
    found: dict[int, list[str]] = {row: [] for row in rows}
    for row, remark in zip(rows, remarks, strict=True):
        found[row].append(remark)
    lines = [[remark, f"{len(rows):,}", rows_in_words(rows)] for remark, rows in by_remark(found).items()]
    note = "These images are used all the same. remarks.csv lists them all."
    return Table(title="Remarks on images", head=["Remark", "Images", "Rows"], rows=lines, note=note, text=["Rows"])


def _references(counts: SetCounts) -> Table:
    names = ("studies", *STATES)
    lines = [[line["label"], *_numbers(line, names)] for _, line in counts.references.iterrows()]
    head = ["Finding", "Studies read", "Positive", "Negative", "Uncertain"]
    return Table(title="Studies labelled by a radiologist", head=head, rows=lines, note="Never trained on.")


def description_markdown(counts: SetCounts, show: Collection[str] = ()) -> str:
    """The tables for a terminal, and all counts by fold."""
    text = f"# Shard set {counts.info.id}\n\n{markdown_text(heading(counts))}\n"
    text += "".join(f"\nWarning: {markdown_text(caution)}.\n" for caution in counts.cautions)
    return "\n".join([text, *(table.markdown() for table in [*description_tables(counts, show), *_by_fold(counts)])])


def heading(counts: SetCounts) -> str:
    """The set in one line."""
    info = counts.info
    table = f" from {info.labels_from.rpartition(' sha256:')[0]}" if info.labels_from else ""
    return (
        f"{info.images:,} images, {info.studies:,} studies, {info.patients:,} patients from {info.source}; "
        f"{len(info.labels)} labels{table}; seed {info.seed}; {counts.state}."
    )


def _by_fold(counts: SetCounts) -> list[Table]:
    """Parts of each fold, and each state of each label by fold."""
    lines = [[f"{line['fold']} {line['part']}", *_numbers(line)] for _, line in counts.folds.iterrows()]
    found = [Table(title="Parts of each fold", head=["Fold", "Images", "Studies", "Patients"], rows=lines)]
    for state in (*STATES, "blank") if counts.info.labels else ():
        wide = counts.labels.pivot(index="label", columns="fold", values=state)
        lines = [[label, *(f"{n:,}" for n in wide.loc[label])] for label in counts.info.labels]
        head = ["Finding", "All", *(f"Fold {k}" for k in range(FOLDS))]
        found.append(Table(title=f"Images {state} for each finding", head=head, rows=lines))
    return found


# Figure


def figure(counts: SetCounts) -> Figure:
    """Histogram of heights and widths with logarithmic counts; both axes start at 0 and have the same scale."""
    height, width, images = (counts.sizes[name].to_numpy() for name in ("height", "width", "images"))
    longest = int(max(height.max(), width.max()))
    step = 2 ** max(0, round(np.log2(longest / 48)))
    edges = np.arange(0, longest + step + 1, step)
    result = Figure(figsize=(7.7, 6.4))

    def panel(x: float, y: float, wide: float, high: float, **shared: Any) -> Axes:
        """Axes placed in inches: a layout engine would give the panels different scales."""
        return result.add_axes((x / 7.7, y / 6.4, wide / 7.7, high / 6.4), **shared)

    axes = panel(0.9, 0.6, 4.2, 4.2)
    top, right = panel(0.9, 4.9, 4.2, 1.0, sharex=axes), panel(5.3, 0.6, 1.0, 4.2, sharey=axes)
    held = np.histogram2d(height, width, bins=(edges, edges), weights=images)[0]
    colours = LogNorm(1, max(2, held.max()))
    shown = axes.pcolormesh(edges, edges, np.ma.masked_equal(held, 0), norm=colours, cmap="viridis_r")
    axes.axline((0, 0), slope=1, linestyle=":", color="grey", linewidth=0.8)
    axes.text(0.04, 0.07, "square", transform=axes.transAxes, rotation=45, color="grey", fontsize="small")
    axes.set(xlim=(0, edges[-1]), ylim=(0, edges[-1]), xlabel="width, px", ylabel="height, px")
    limits = (0.5, 2 * max(held.sum(axis=0).max(), held.sum(axis=1).max()))  # a single image has a bar too
    top.stairs(held.sum(axis=0), edges, fill=True, color="0.45")
    top.set(yscale="log", ylim=limits, ylabel="images")
    right.stairs(held.sum(axis=1), edges, fill=True, color="0.45", orientation="horizontal")
    right.set(xscale="log", xlim=limits, xlabel="images")
    top.tick_params(labelbottom=False)
    right.tick_params(labelleft=False)
    bar = result.colorbar(shown, cax=panel(6.5, 0.6, 0.15, 4.2), label=f"images per bin of {step} × {step} px")
    for axis in (axes.xaxis, axes.yaxis, top.yaxis, right.xaxis, bar.ax.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    note = textwrap.fill(f"Sizes of {size_note(counts)}", 90)
    result.text(0.9 / 7.7, 6.0 / 6.4, note, fontsize="small", verticalalignment="bottom")
    return result


# Files


def write(counts: SetCounts, folder: Path, out: Path, show: Collection[str] = ()) -> list[Path]:
    """Write describe.md and, where there is something to show, sizes.png and remarks.csv to `out`.

    Raises ShardError if that is inside the set.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ShardError(
            f"--out {out} is inside the set {folder}, which must hold only its own files: choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "describe.md"]
    write_bytes(written[0], description_markdown(counts, show).encode())
    if len(counts.sizes):
        written.append(out / "sizes.png")
        write_figure(written[-1], figure(counts), dpi=150)
    if len(counts.remarks):
        written.append(out / "remarks.csv")
        write_bytes(written[-1], counts.remarks.to_csv(index=False, lineterminator="\n").encode())
    else:
        (out / "remarks.csv").unlink(missing_ok=True)  # of an earlier description
    return written
