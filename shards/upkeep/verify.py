"""Is a shard set what it was when it was built? Hashes, indexes, rows; every image decoded on request. Reads only."""

import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.files import sha256
from cxrfast.machine import usable_cores
from cxrfast.progress import megabytes, progress
from cxrfast.shards.building.layout import set_id
from cxrfast.shards.format import manifest
from cxrfast.shards.format.checksums import check_finished, parse_sums
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.info import SetInfo, read_set, read_set_json
from cxrfast.shards.format.manifest import ShardManifest, quarantine_bytes, read_manifest, read_manifests
from cxrfast.shards.format.names import files_in, shard_name, shard_path
from cxrfast.shards.format.rows import label_names, read_rows
from cxrfast.shards.format.tar import read_contents, read_index
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.cell_means import STEPS, grid, tolerance, unpack
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem, hashing_speed
from cxrfast.shards.upkeep.verify_source import SourceVerdict, verify_source
from cxrfast.splits import deal


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of comparing a set with its hashes."""

    info: SetInfo | None
    """None where set.json is damaged."""
    rows: dict[int, int]
    """Rows held by scale; empty where files have changed."""
    quarantined: int
    without_grids: int
    """Manifests, of all scales; earlier versions took no grids."""
    bytes: int
    """Read and hashed."""
    seconds: float
    """That hashing took."""
    problems: list[Problem]

    def summary(self, folder: Path, deep: bool = False) -> str:
        """A whole set in one line for people."""
        held = ", ".join(f"{n:,} rows at {scale} px" for scale, n in self.rows.items())
        wanted = self.info.images if self.info else 0
        partly = [f"{scale} px" for scale, n in self.rows.items() if n + self.quarantined < wanted]
        rest = f"; at {', '.join(partly)} not all shards are built yet" if partly else ""
        if self.without_grids:
            rest += f"; shards that hold no grids: {self.without_grids:,} (`cxrfast verify --repair` adds them)"
        return (
            f"{folder}: {held}; {wanted:,} planned, {self.quarantined:,} quarantined; "
            f"{hashing_speed(self.bytes, self.seconds)}{', every image decoded' if deep else ''}: whole{rest}"
        )


def verify(folder: Path, deep: bool = False) -> Verdict:
    """Compare every file of the set with SHA256SUMS, and the files with each other; `deep` decodes every image.

    Raises ShardError only where nothing can be compared: no set, another schema version, never finished.
    """
    folder = Path(folder)
    sums, problems = _read_sums(folder)
    there = set(files_in(folder))
    regular = {name for name in sums.keys() & there if (folder / name).is_file()}
    problems += [Problem(name, "missing") for name in sorted(sums.keys() - there)]
    problems += [Problem(name, "not part of the set") for name in sorted(there - sums.keys())]
    problems += [Problem(name, "is no regular file") for name in sorted((sums.keys() & there) - regular)]
    start = time.monotonic()
    problems += _changed(folder, {name: sums[name] for name in sorted(regular)})
    seconds = time.monotonic() - start
    info = None if any(p.path == "set.json" for p in problems) else read_set(folder)
    inside = _Inside()
    if info and not problems:  # what follows reads files that are known to be as they were signed
        _look_inside(inside, folder, info, sums, deep)
    return Verdict(
        info=info,
        rows=inside.rows,
        quarantined=max(inside.quarantined.values(), default=0),
        without_grids=inside.without_grids,
        bytes=sum((folder / name).stat().st_size for name in regular),
        seconds=seconds,
        problems=problems + inside.problems,
    )


# Files and their hashes


def _read_sums(folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """SHA256SUMS as far as it can be read, and what is wrong with it. Raises ShardError where there is none."""
    try:
        sums, wrong = parse_sums((folder / "SHA256SUMS").read_bytes())
    except FileNotFoundError:
        sums, wrong = {}, []
    if not sums:
        read_set(folder)
    if not wrong:
        check_finished(sums, folder)
    problems = [Problem("SHA256SUMS", what) for what in wrong]
    if "set.json" not in sums:
        problems.append(Problem("SHA256SUMS", "does not list set.json"))
    return sums, problems


def _changed(folder: Path, sums: dict[str, str]) -> Iterator[Problem]:
    """Files whose bytes are not those in SHA256SUMS. Threads: hashing releases the GIL."""

    def look(name: str) -> str:
        try:
            return "" if sha256(folder / name) == sums[name] else "its bytes have changed"
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    sizes = {name: (folder / name).stat().st_size for name in sums}
    total = round(sum(sizes.values()) / 1e6)
    with ThreadPoolExecutor(usable_cores()) as pool, progress("hashing", total, unit="MB") as advance:
        count = megabytes(advance)
        for name, what in zip(sums, pool.map(look, sums), strict=True):
            count(sizes[name])
            if what:
                yield Problem(name, what)


# Files against each other


@dataclass
class _Inside:
    """What is found in files that are as they were signed."""

    rows: dict[int, int] = field(default_factory=dict)
    """Rows held by scale."""
    quarantined: dict[int, int] = field(default_factory=dict)
    """Rows quarantined by scale."""
    without_grids: int = 0
    problems: list[Problem] = field(default_factory=list)


def _look_inside(found: _Inside, folder: Path, info: SetInfo, sums: dict[str, str], deep: bool) -> None:
    """Compare rows, manifests, indexes and tars with each other; `deep`: images, too. Fills `found`."""
    try:
        found.problems += _unreadable(folder)
        if not found.problems:
            found.problems += _rows_problems(folder, info)
        for scale in manifest.scales_in(folder) if not found.problems else []:
            manifests = [m for n in manifest.built(folder, scale) if (m := read_manifest(folder, scale, n))]
            found.rows[scale] = sum(len(m.rows) for m in manifests)
            found.quarantined[scale] = sum(len(m.quarantined) for m in manifests)
            found.without_grids += sum(m.lacks_grids for m in manifests)
            found.problems += _misplaced(folder, scale, manifests, sums)
            found.problems += _shard_problems(folder, info, manifests)
            if deep:
                found.problems += _image_problems(folder, info, manifests)
    except ShardError as error:  # a file that makes no sense, and was signed so
        found.problems.append(Problem(".", str(error)))


def _unreadable(folder: Path) -> Iterator[Problem]:
    """Manifests that make no sense, and were signed so."""
    for scale in manifest.scales_in(folder):
        for shard in manifest.built(folder, scale):
            try:
                read_manifest(folder, scale, shard)
            except ShardError:
                yield Problem(shard_name(scale, shard, "json"), "cannot be read, and was signed so")


def _rows_problems(folder: Path, info: SetInfo) -> Iterator[Problem]:
    rows = read_rows(folder / "rows.parquet")
    fold, block = deal(rows["patient_id"].tolist(), info.seed)
    paths = dict(zip(rows["row"], rows["path"], strict=True))
    if rows["row"].tolist() != list(range(info.images)):
        yield Problem("rows.parquet", f"does not hold the rows 0 to {info.images - 1:,}")
    elif set_id(rows, info.recipe) != info.id:
        yield Problem("rows.parquet", "does not match the set id in set.json")
    elif (rows["fold"] != fold).any() or (rows["block"] != block).any():
        yield Problem("rows.parquet", "deals patients to other folds than the seed in set.json does")
    elif read_set_json(folder) != info or list(label_names(rows)) != info.labels:
        yield Problem("set.json", "differs from its copy in rows.parquet, or from the labels there")
    elif quarantine_bytes(paths, read_manifests(folder)) != (folder / "quarantine.csv").read_bytes():
        yield Problem("quarantine.csv", "lists other rows than the manifests")


def _misplaced(folder: Path, scale: int, manifests: list[ShardManifest], sums: dict[str, str]) -> Iterator[Problem]:
    """Manifests of another scale or shard than their name says, or of another tar."""
    for m, shard in zip(manifests, manifest.built(folder, scale), strict=True):
        tar = shard_path(folder, scale, shard, "tar")
        name = str(tar.with_suffix(".json").relative_to(folder))
        if (m.scale, m.shard) != (scale, shard):
            yield Problem(name, f"is the manifest of shard {m.shard} at {m.scale} px")
        elif m.sha256 != sums.get(str(tar.relative_to(folder))) or m.bytes != tar.stat().st_size:
            yield Problem(name, "is the manifest of another tar")


def _shard_problems(folder: Path, info: SetInfo, manifests: list[ShardManifest]) -> Iterator[Problem]:
    """Manifests, indexes and tars that contradict each other, the rows table, or the same shard at the first scale."""
    for number, m in enumerate(manifests):
        name = str(shard_path(folder, m.scale, m.shard, "json").relative_to(folder))
        wanted = info.rows_of(number)
        if m.shard != number:
            yield Problem(
                name, f"shard {number} is missing at {m.scale} px: `cxrfast shard --scale {m.scale}` builds it"
            )
            return
        if m.set != info.id:
            yield Problem(name, "belongs to another set")
        if sorted([*m.rows, *map(int, m.quarantined)]) != list(wanted):
            yield Problem(name, f"does not account for the rows {wanted.start:,} to {wanted.stop - 1:,}")
        other = read_manifest(folder, manifest.scales_in(folder)[0], m.shard)
        if other and other.rows != m.rows:
            yield Problem(name, f"holds other rows than at {other.scale} px")
        try:
            if [row for row, *_ in read_index(folder, m.scale, m.shard)] != m.rows:
                yield Problem(name, "lists other rows than its index")
        except ShardError as error:
            yield Problem(name, str(error))


# Images


def _image_problems(folder: Path, info: SetInfo, manifests: list[ShardManifest]) -> Iterator[Problem]:
    """Images that do not decode to scale × scale pixels or differ from their crc32 or grid; one thread per shard."""
    scale = manifests[0].scale if manifests else 0
    ids = read_rows(folder / "rows.parquet")["image_id"].astype(object).to_numpy()

    def look(m: ShardManifest) -> list[Problem]:
        return _decode_shard(folder, info, m, ids[m.rows].tolist())

    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        progress(f"decoding {scale} px", sum(len(m.rows) for m in manifests)) as advance,
    ):
        for m, problems in zip(manifests, pool.map(look, manifests), strict=True):
            yield from problems
            advance(len(m.rows))


def _decode_shard(folder: Path, info: SetInfo, m: ShardManifest, ids: list[str]) -> list[Problem]:
    """Problems of one shard, whose files are as they were signed."""
    path = shard_path(folder, m.scale, m.shard, "tar")
    name = shard_name(m.scale, m.shard, "tar")
    problems: list[Problem] = []

    def found(what: str) -> None:
        problems.append(Problem(name, what, is_signed=True))

    if read_contents(path).image_ids != ids:
        found("holds other images than the plan says")
        return problems
    grids = unpack(m.grids, len(m.rows)) / STEPS if m.grids else None
    with open(path, "rb") as tar:
        for n, (row, offset, size) in enumerate(read_index(folder, m.scale, m.shard)):
            tar.seek(offset)
            data = tar.read(size)
            try:
                image = decode_member(data, info.codec)
            except BadImage as error:
                found(f"row {row}: {error.reason}")
                continue
            if image.shape != (m.scale, m.scale):
                found(f"row {row} is {image.shape[1]} × {image.shape[0]} px")
            elif grids is not None:
                off = abs(grid(image) / STEPS - grids[n]).max()
                if off > tolerance(info.codec, info.quality, m.scale):
                    found(f"row {row} differs from its grid, by up to {off:.1f} grey levels")
            if zlib.crc32(data) != m.crc32[n]:
                found(f"row {row} differs from its crc32")
    return problems


# The command


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `cxrfast verify` says of a set and, where it was asked for, of its source tree."""

    folder: Path
    verdict: Verdict
    source: SourceVerdict | None
    lines: list[str]
    """What is printed, problems apart."""
    is_repaired: bool

    @property
    def problems(self) -> list[Problem]:
        return [*self.verdict.problems, *(self.source.problems if self.source else ())]

    @property
    def is_whole(self) -> bool:
        return not self.problems

    def advice(self) -> str:
        """How many problems there are, and what to do about those of the set."""
        what = f"{self.folder}: {len(self.problems):,} problems, named above"
        if not self.verdict.problems:
            return what
        if all(problem.is_signed for problem in self.problems):
            return (
                f"{what}; SHA256SUMS says the same, so nothing in the set tells what was right: restore these shards from a "
                "copy, or delete their files and run the same `cxrfast shard` command again"
            )
        return what if self.is_repaired else f"{what}; `cxrfast verify --repair` mends what it can"


def find_source(location: str | None, default: str, is_needed: bool) -> Tree | None:
    """The source tree: what was given, else the default, if the source is needed, if it is a URL or if it is there."""
    if not location and (is_needed or "://" in default or os.path.isdir(default)):
        location = default
    return Tree(location) if location else None


def inspect(folder: Path, source: Tree | None, *, deep: bool = False, is_repaired: bool = False) -> Inspection:
    """`verify` the set and, where it is given, its source tree. `is_repaired`: a repair has been tried before."""
    verdict = verify(folder, deep=deep)
    lines, of_source = [], None
    if source:
        of_source = verify_source(folder, source)
        lines.append(of_source.summary(source))
    if not verdict.problems and not (of_source and of_source.problems):
        lines.append(verdict.summary(folder, deep))
    return Inspection(folder=folder, verdict=verdict, source=of_source, lines=lines, is_repaired=is_repaired)
