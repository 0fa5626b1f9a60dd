"""Remarks on images, counted, as lines of a report: how many images, which rows, and what to do."""

from collections.abc import Mapping, Sequence

from cxrfast.shards.images.remark import Remark

SHOWN = 5
"""Rows named for each remark."""

ADVICE = {
    Remark.UNIFORM.value: "they show nothing; look at their source images",
    Remark.NARROW_PNG.value: "with --grey mimic or --grey window, a new set uses it all",
}
"""What to do, where something can be done."""


def by_remark(remarks: Mapping[int, Sequence[str]]) -> dict[str, list[int]]:
    """{row: remarks} → {remark: its rows, ascending}, most frequent first."""
    rows: dict[str, list[int]] = {}
    for row in sorted(remarks):
        for remark in remarks[row]:
            rows.setdefault(remark, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])))


def rows_in_words(rows: Sequence[int]) -> str:
    """`row 3`, or `rows 3, 7, …`."""
    some = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
    return f"row{'s' if len(rows) > 1 else ''} {some}"


def remark_lines(remarks: Mapping[int, Sequence[str]]) -> list[str]:
    """One line for each remark on the images of a set."""
    return [
        f"{len(rows):,} image{'s' if len(rows) > 1 else ''}: {_advised(remark)} ({rows_in_words(rows)})"
        for remark, rows in by_remark(remarks).items()
    ]


def sample_lines(counts: Mapping[str, int], sampled: int) -> list[str]:
    """One line for each remark on `sampled` images."""
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{n:,} of {sampled:,} sampled images: {_advised(remark)}" for remark, n in most_first]


def _advised(remark: str) -> str:
    return f"{remark}; {ADVICE[remark]}" if remark in ADVICE else remark
