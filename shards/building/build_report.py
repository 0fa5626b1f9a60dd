"""What a build did, or what a dry run found to do."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cxrfast.shards.building.cautions import remark_lines, sample_lines
from cxrfast.shards.building.estimate import Estimate
from cxrfast.shards.building.reading import MISSING_ALLOWED
from cxrfast.shards.format.info import SetInfo
from cxrfast.units import duration, size


@dataclass(kw_only=True)
class Report:
    """Result of a build or dry run."""

    info: SetInfo
    scales: list[int]
    source_counts: dict[str, int]
    source_notes: tuple[str, ...] = ()
    found: dict[str, int] = field(default_factory=dict)
    """Numbers of listed and other images in the tree; empty where a set was continued."""
    estimate: Estimate
    kinds: dict[str, int] = field(default_factory=dict)
    """Source files looked at, by kind."""
    cautions: list[str] = field(default_factory=list)
    """What to know about the rows before training on them."""
    rows: dict[int, int] = field(default_factory=dict)
    """Rows at each scale, including shards of earlier builds."""
    bytes: dict[int, int] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    """Rows left out, and why."""
    remarks: dict[int, list[str]] = field(default_factory=dict)
    """What is noteworthy about rows that are held, by row."""
    copies: list[str] = field(default_factory=list)
    """Whether different patients have the same image, in words."""
    seconds: float = 0.0
    is_done: bool = False
    """False after a dry run."""
    missing_shards: int = 0
    """Shards at the requested scales that `limit` or other parts left for later."""

    @property
    def complete(self) -> bool:
        return self.is_done and not self.missing_shards

    def lines(self, out: Path) -> list[str]:
        """The report as text; `out` is the folder of the set."""
        return [*self.listed(), *self.outcome(out)]

    def outcome(self, out: Path) -> list[str]:
        """What was built, or is to be built."""
        return self._done(out) if self.is_done else self._to_do(out)

    def listed(self) -> list[str]:
        """What the source lists, and what to know about it before the build."""
        info = self.info
        lines = [f"{info.images:,} images, {info.studies:,} studies, {info.patients:,} patients from {info.source}"]
        lines += [f"{what}: {n:,}" for what, n in (self.source_counts | self.found).items() if n]
        lines += self.source_notes
        lines += [f"warning: {text}" for text in self.cautions]
        return lines

    def _to_do(self, out: Path) -> list[str]:
        needed = self.estimate
        lines = [
            f"to do at {s} px: {needed.images[s]:,} rows, about {size(needed.bytes[s])} in {needed.files[s]:,} files"
            for s in needed.images
        ] or ["nothing left to do"]
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.kinds.items())
        return [
            *lines,
            *([f"files looked at: {kinds}"] if kinds else []),
            *(f"warning: {line}" for line in sample_lines(needed.remarks, needed.sampled)),
            f"free in {out}: {size(needed.free)}",
            f"estimated time: {duration(needed.seconds)}, from a sample of the images",
        ]

    def _done(self, out: Path) -> list[str]:
        reasons = Counter(self.quarantined.values())
        left = f"{self.missing_shards:,} shards are left for other parts or a run without --limit"
        return [
            *(f"{s} px: {n:,} rows, {size(self.bytes[s])}" for s, n in sorted(self.rows.items())),
            f"quarantined: {len(self.quarantined):,}"
            + "".join(f"; {reason}: {n:,}" for reason, n in reasons.most_common())
            + (f" (see {out / 'quarantine.csv'})" if reasons else ""),
            *(f"warning: {line}" for line in (*self._lost(), *remark_lines(self.remarks), *self.copies)),
            f"set {self.info.id} in {out}: {'complete' if self.complete else left}, {duration(self.seconds)}",
        ]

    def _lost(self) -> list[str]:
        """A sentence if so many rows are quarantined that their files may be at fault."""
        lost = len(self.quarantined)
        tried = lost + max(self.rows.values(), default=0)
        if lost <= MISSING_ALLOWED * tried:
            return []
        return [
            f"{lost:,} of {tried:,} images ({100 * lost / tried:.3g} %) are left out: if the download is incomplete, finish it "
            "and add them with --retry-quarantined"
        ]
