"""Check that a shard set is as it was built: hashes, indexes, rows and, on request, every image. Reads only."""

import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import TarError
from typing import NamedTuple

from cxrfast.errors import ShardError
from cxrfast.files import open_file, read_file, sha256
from cxrfast.machine import usable_cores
from cxrfast.progress import megabytes, progress
from cxrfast.shards.building.agreement import disagreements
from cxrfast.shards.building.layout import set_id
from cxrfast.shards.format import manifest
from cxrfast.shards.format.checksums import check_finished, parse_sums
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.info import SetInfo, read_set, read_set_json
from cxrfast.shards.format.manifest import ShardManifest, quarantine_bytes, read_manifest, read_manifests
from cxrfast.shards.format.names import files_in, shard_files, shard_name, shard_path
from cxrfast.shards.format.rows import is_relabelled, label_names, read_rows
from cxrfast.shards.format.tar import read_contents, read_index
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.cell_means import STEPS, grid, tolerance, unpack
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem, hashing_speed
from cxrfast.shards.upkeep.verify_source import verify_source
from cxrfast.splits import deal


@dataclass(kw_only=True)
class Verdict:
    """Result of verifying a set."""

    info: SetInfo | None
    """None if set.json is damaged."""
    bytes: int
    """Bytes hashed."""
    seconds: float
    """Time that hashing took."""
    problems: list[Problem]
    rows: dict[int, int] = field(default_factory=dict)
    """Rows held by scale; empty if files have changed."""
    quarantined: int = 0
    """Rows quarantined, at the scale with most."""
    without_grids: int = 0
    """Manifests without grids, over all scales; earlier versions took none."""

    def summary(self, folder: Path, deep: bool = False) -> str:
        """One line about a whole set."""
        held = ", ".join(f"{n:,} rows at {scale} px" for scale, n in self.rows.items())
        wanted = self.info.images if self.info else 0
        partly = [f"{scale} px" for scale, n in self.rows.items() if n + self.quarantined < wanted]
        rest = f"; at {', '.join(partly)} some shards are not built yet" if partly else ""
        if self.without_grids:
            rest += f"; shards without grids: {self.without_grids:,} (`cxrfast verify --repair` adds them)"
        return (
            f"{folder}: {held}; {wanted:,} planned, {self.quarantined:,} quarantined; "
            f"{hashing_speed(self.bytes, self.seconds)}{', every image decoded' if deep else ''}: whole{rest}"
        )


def verify(folder: Path, deep: bool = False) -> Verdict:
    """Compare every file of the set with SHA256SUMS, and the files with each other; `deep` decodes every image and compares the
    scales with each other.

    Raises ShardError only if nothing can be compared: no set, another schema version, or a set never finished.
    """
    folder = Path(folder)
    sums, problems = _read_sums(folder)
    there = set(files_in(folder))
    regular = {name for name in sums.keys() & there if (folder / name).is_file()}
    problems += [Problem(name, "missing") for name in sorted(sums.keys() - there)]
    problems += [Problem(name, "not part of the set") for name in sorted(there - sums.keys())]
    problems += [Problem(name, "is not a regular file") for name in sorted((sums.keys() & there) - regular)]
    start = time.monotonic()
    problems += _changed(folder, {name: sums[name] for name in sorted(regular)})
    seconds = time.monotonic() - start
    info = None if any(p.path == "set.json" for p in problems) else read_set(folder)
    size = sum((folder / name).stat().st_size for name in regular)
    verdict = Verdict(info=info, bytes=size, seconds=seconds, problems=problems)
    if info and not problems:  # from here on, every file is known to be as it was signed
        _look_inside(verdict, folder, info, sums, deep)
    return verdict


# Files and their hashes


def _read_sums(folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """The readable lines of SHA256SUMS, and what is wrong with it. Raises ShardError if there is none."""
    try:
        sums, wrong = parse_sums(read_file(folder / "SHA256SUMS"))
    except FileNotFoundError:
        sums, wrong = {}, []
    if not sums:
        read_set(folder)
    if not (wrong or (sums and (folder / "quarantine.csv").exists())):  # which an unfinished set does not have
        check_finished(sums, folder)
    problems = [Problem("SHA256SUMS", what) for what in wrong]
    if "set.json" not in sums:
        problems.append(Problem("SHA256SUMS", "does not list set.json"))
    return sums, problems


def _changed(folder: Path, sums: dict[str, str]) -> Iterator[Problem]:
    """Yield files whose hash differs from SHA256SUMS. Uses threads, since hashing releases the GIL."""

    def look(name: str) -> str:
        try:
            if sha256(folder / name) == sums[name]:
                return ""
            if name == "rows.parquet" and is_relabelled(folder):
                return "relabelled, but its hash is still the old one: run the same `cxrfast relabel` again"
            return "its bytes have changed"
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


def _look_inside(found: Verdict, folder: Path, info: SetInfo, sums: dict[str, str], deep: bool) -> None:
    """Compare rows, manifests, indexes and tars with each other; if `deep`, images too. Fills `found`."""
    try:
        found.problems += _unreadable(folder)
        is_readable = not found.problems
        if is_readable:
            found.problems += _rows_problems(folder, info)
        for scale in manifest.scales_in(folder) if not found.problems else []:
            manifests = [m for n in manifest.built(folder, scale) if (m := read_manifest(folder, scale, n))]
            found.rows[scale] = sum(len(m.rows) for m in manifests)
            found.quarantined = max(found.quarantined, sum(len(m.quarantined) for m in manifests))
            found.without_grids += sum(m.lacks_grids for m in manifests)
            found.problems += _shard_problems(folder, info, scale, manifests, sums)
            if deep:
                found.problems += _image_problems(folder, info, scale, manifests)
        if deep and is_readable:
            found.problems += _scale_problems(folder, info)
    except ShardError as error:  # a file that was already invalid when it was signed
        found.problems.append(Problem(".", str(error)))


def _unreadable(folder: Path) -> Iterator[Problem]:
    """Yield manifests that were already invalid when they were signed."""
    for scale in manifest.scales_in(folder):
        for shard in manifest.built(folder, scale):
            try:
                read_manifest(folder, scale, shard)
            except ShardError:
                yield Problem(shard_name(scale, shard, "json"), "cannot be read, although its hash is right")


def _rows_problems(folder: Path, info: SetInfo) -> Iterator[Problem]:
    rows = read_rows(folder / "rows.parquet")
    own = rows["fold"].to_numpy() if info.own_folds else None  # which the set id covers
    fold, block = deal(rows["patient_id"].tolist(), info.seed, own)
    paths = dict(zip(rows["row"], rows["path"], strict=True))
    if len(rows) != info.images:  # numbered from 0 on, or it could not be read
        yield Problem("rows.parquet", f"does not hold the rows 0 to {info.images - 1:,}")
    elif set_id(rows, info.recipe, info.own_folds) != info.id:
        yield Problem("rows.parquet", "does not match the set id in set.json")
    elif (rows["fold"] != fold).any() or (rows["block"] != block).any():
        yield Problem("rows.parquet", "assigns patients to other folds than the seed in set.json gives")
    elif read_set_json(folder) != info or list(label_names(rows)) != info.labels:
        yield Problem("set.json", "differs from its copy in rows.parquet, or from the labels there")
    elif quarantine_bytes(paths, read_manifests(folder)) != read_file(folder / "quarantine.csv"):
        yield Problem("quarantine.csv", "lists other rows than the manifests")


def _shard_problems(
    folder: Path, info: SetInfo, scale: int, manifests: list[ShardManifest], sums: dict[str, str]
) -> Iterator[Problem]:
    """Yield manifests that contradict their name, their tar or index, the rows table, or the shard at the first scale."""
    first = manifest.scales_in(folder)[0]
    for number, (shard, m) in enumerate(zip(manifest.built(folder, scale), manifests, strict=True)):
        tar, _, name = shard_files(scale, shard)
        wanted = info.rows_of(number)
        if (m.scale, m.shard) != (scale, shard):
            yield Problem(name, f"is the manifest of shard {m.shard} at {m.scale} px")
        elif m.sha256 != sums.get(tar) or m.bytes != (folder / tar).stat().st_size:
            yield Problem(name, "is the manifest of another tar")
        if shard != number:
            yield Problem(name, f"shard {number} is missing at {scale} px: `cxrfast shard --scale {scale}` builds it")
            return
        if m.set != info.id:
            yield Problem(name, "belongs to another set")
        if sorted([*m.rows, *map(int, m.quarantined)]) != list(wanted):
            yield Problem(name, f"does not account for the rows {wanted.start:,} to {wanted.stop - 1:,}")
        other = read_manifest(folder, first, shard)
        if other and other.rows != m.rows:
            yield Problem(name, f"holds other rows than at {first} px")
        try:
            if [row for row, *_ in read_index(folder, scale, shard)] != m.rows:
                yield Problem(name, "lists other rows than its index")
        except ShardError as error:
            yield Problem(name, str(error))


# Images


def _image_problems(folder: Path, info: SetInfo, scale: int, manifests: list[ShardManifest]) -> Iterator[Problem]:
    """Yield images that do not decode to scale × scale px or differ from their crc32 or grid. One thread per shard."""
    ids = read_rows(folder / "rows.parquet")["image_id"].astype(object).to_numpy()
    manifests = [m for m in manifests if not m.rows or m.rows[-1] < len(ids)]  # the others were reported before

    def look(m: ShardManifest) -> list[Problem]:
        name = shard_name(scale, m.shard, "tar")
        return [Problem(name, what, is_signed=True) for what in _decode_shard(folder, info, m, ids[m.rows].tolist())]

    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        progress(f"decoding {scale} px", sum(len(m.rows) for m in manifests)) as advance,
    ):
        for m, problems in zip(manifests, pool.map(look, manifests), strict=True):
            yield from problems
            advance(len(m.rows))


def _scale_problems(folder: Path, info: SetInfo) -> Iterator[Problem]:
    """Yield shards with rows that come from other images than at the smallest scale that can be compared."""
    scales = manifest.scales_in(folder)
    for shard in range(info.shards):
        manifests = [m for scale in scales if (m := read_manifest(folder, scale, shard))]
        for m, what in disagreements(manifests, info):
            yield Problem(shard_name(m.scale, shard, "tar"), what, is_signed=True)


def _decode_shard(folder: Path, info: SetInfo, m: ShardManifest, ids: list[str]) -> Iterator[str]:
    """Yield what is wrong with the images of one shard, which should have these ids."""
    path = shard_path(folder, m.scale, m.shard, "tar")
    try:
        found = read_contents(path).image_ids
    except (TarError, ValueError, OSError) as error:
        yield f"cannot be read ({error})"
        return
    if found != ids:
        yield "holds other images than planned"
        return
    places = read_index(folder, m.scale, m.shard)
    if [row for row, *_ in places] != m.rows:
        return  # which was reported before
    grids = unpack(m.grids, len(m.rows)) / STEPS if m.grids else None
    with open(open_file(path), "rb") as tar:
        end = os.fstat(tar.fileno()).st_size
        for n, (row, offset, size) in enumerate(places):
            if offset + size > end:
                yield f"row {row} is beyond its end"
                continue
            tar.seek(offset)
            data = tar.read(size)
            try:
                image = decode_member(data, info.codec)
            except BadImage as error:
                yield f"row {row}: {error.reason}"
                continue
            if image.shape != (m.scale, m.scale):
                yield f"row {row} is {image.shape[1]} × {image.shape[0]} px"
            elif grids is not None:
                off = abs(grid(image) / STEPS - grids[n]).max()
                if off > tolerance(info.codec, info.quality, m.scale):
                    yield f"row {row} differs from its grid, by up to {off:.1f} grey levels"
            if zlib.crc32(data) != m.crc32[n]:
                yield f"row {row} differs from its crc32"


# The command


class Inspection(NamedTuple):
    """Result of `cxrfast verify` for a set and, if requested, its source tree."""

    lines: list[str]
    """Lines to print, apart from the problems."""
    problems: list[Problem]
    advice: str
    """How many problems there are, and what to do about the set's."""


def find_source(location: str | None, default: str, is_needed: bool) -> Tree | None:
    """The source tree given, or the default one if the source is needed or the default is a URL or exists."""
    if not location and (is_needed or "://" in default or os.path.isdir(default)):
        location = default
    return Tree(location) if location else None


def inspect(folder: Path, source: Tree | None, *, deep: bool = False, is_repaired: bool = False) -> Inspection:
    """`verify` the set and, if given, its source tree. `is_repaired`: a repair has just been tried."""
    verdict = verify(folder, deep=deep)
    lines, problems = [], verdict.problems
    if source:
        of_source = verify_source(folder, source)
        lines.append(of_source.summary(source))
        problems = problems + of_source.problems
    if not problems:
        lines.append(verdict.summary(folder, deep))
    advice = f"{folder}: {len(problems):,} problems, named above"
    if verdict.problems and all(problem.is_signed for problem in problems):
        advice += (
            "; the hashes match, so the set was built this way and nothing in it says what was right: restore these shards "
            "from a copy, or delete their files and run the same `cxrfast shard` command again"
        )
    elif verdict.problems and not is_repaired:
        advice += "; `cxrfast verify --repair` repairs what it can"
    return Inspection(lines, problems, advice)
