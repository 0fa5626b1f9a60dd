"""SHA256SUMS: hashes of all other files of a set.

While a build runs, it lists only the shards that existed before.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.files import read_file, sha256, write_bytes
from cxrfast.shards.format.info import write_set_json
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.names import NAMES, SET_FILES, shard_files, shard_name
from cxrfast.shards.format.rows import is_relabelled

MARKERS = ("SHA256SUMS.relabelling", "SHA256SUMS.unfinished")
"""What earlier versions called SHA256SUMS while they relabelled or built."""


def sums_bytes(sums: dict[str, str]) -> bytes:
    """Contents of SHA256SUMS, as `sha256sum -c` reads it, from {relative path: sha256}."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def write_sums(folder: Path, manifests: list[ShardManifest]) -> None:
    """Write SHA256SUMS of the set's own files and of the shards of these manifests.

    Tars were hashed when they were written, and files of shards that are listed already keep their hash, so damage stays
    visible.
    Raises ShardError if a tar or index is missing.
    """
    known = {shard_name(m.scale, m.shard, "tar"): m.sha256 for m in manifests}
    known |= {name: digest for name, digest in listed_sums(folder).items() if name not in SET_FILES}
    names = [name for m in manifests for name in shard_files(m.scale, m.shard)]
    for name in names:
        if not (folder / name).is_file():
            raise ShardError(f"{folder / name} is missing: run the same `cxrfast shard` command again to rebuild it")
    sums = {name: known.get(name) or sha256(folder / name) for name in (*names, *SET_FILES)}
    write_bytes(folder / "SHA256SUMS", sums_bytes(sums))


def mark_unfinished(folder: Path, rebuilt: Iterable[str]) -> None:
    """Remove the set's own files and the files `rebuilt` from SHA256SUMS, until `write_sums`.

    quarantine.csv goes too: next to it, a SHA256SUMS without the set's own files is one that lost its end.
    """
    (folder / "quarantine.csv").unlink(missing_ok=True)
    sums = listed_sums(folder)
    kept = {name: digest for name, digest in sums.items() if name not in {*SET_FILES, *rebuilt}}
    if not kept:
        (folder / "SHA256SUMS").unlink(missing_ok=True)
    elif kept != sums:
        write_bytes(folder / "SHA256SUMS", sums_bytes(kept))


def check_undamaged(folder: Path) -> None:
    """Raises ShardError if SHA256SUMS or rows.parquet is damaged, so that no command signs the damage."""
    adopt_earlier(folder)
    path, sums = folder / "rows.parquet", listed_sums(folder)
    if path.name in sums and path.is_file() and sha256(path) != sums[path.name] and not is_relabelled(folder):
        raise ShardError(f"{path} is damaged: repair it first, with `cxrfast verify --repair {folder}`")


def adopt_earlier(folder: Path) -> None:
    """Rename SHA256SUMS back if an earlier version was killed while it had another name."""
    for name in MARKERS:
        marker = folder / name
        with suppress(FileNotFoundError):  # another part was quicker
            if marker.exists() and name.endswith("relabelling"):
                with suppress(ShardError):
                    write_set_json(folder)  # which came after rows.parquet
            if (folder / "SHA256SUMS").exists() or not marker.stat().st_size:
                marker.unlink()
            else:
                os.replace(marker, folder / "SHA256SUMS")


def listed_sums(folder: Path) -> dict[str, str]:
    """{relative path: sha256}, of a set that is finished or not. Raises ShardError if SHA256SUMS is damaged."""
    path = folder / "SHA256SUMS"
    try:
        sums, wrong = parse_sums(read_file(path))
    except FileNotFoundError:
        return {}
    if wrong:
        raise ShardError(f"{path} is damaged ({wrong[0]}): `cxrfast verify --repair {folder}` rewrites it")
    return sums


def read_sums(folder: Path) -> dict[str, str]:
    """{relative path: sha256}. Raises ShardError if the set was never finished."""
    sums = listed_sums(folder)
    check_finished(sums, folder)
    return sums


def check_finished(sums: dict[str, str], where: object) -> None:
    """Raises ShardError if `sums` belong to an unfinished set."""
    if not sums.keys() & set(SET_FILES):
        what = "SHA256SUMS lists only some of its shards" if sums else "no SHA256SUMS"
        raise ShardError(
            f"{where} is not finished ({what}): run the same `cxrfast shard` or `cxrfast stage` command again"
        )


def parse_sums(data: bytes) -> tuple[dict[str, str], list[str]]:
    """{relative path: sha256} of the valid lines, and what is wrong with the others."""
    sums: dict[str, str] = {}
    wrong = []
    *lines, end = data.decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        digest, name = line[:64], line[66:]
        if line[64:66] != "  " or not re.fullmatch("[0-9a-f]{64}", digest) or not NAMES.fullmatch(name) or name in sums:
            wrong.append(f"line {number} is not a hash and the name of a file")
        else:
            sums[name] = digest
    if list(sums) != sorted(sums):
        wrong.append("its lines are out of order")
    if end or not lines:
        wrong.append("no newline at its end")
    return sums, wrong
