"""SHA256SUMS: what a finished set signs, and what is kept of it while a build goes on."""

import re
from collections.abc import Iterable
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.files import sha256, write_bytes
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.names import NAMES, SET_FILES, UNFINISHED, check_labels_settled, shard_files, shard_name


def sums_bytes(sums: dict[str, str]) -> bytes:
    """The content of SHA256SUMS, as `sha256sum -c` reads it, from {relative path: sha256}."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def write_sums(folder: Path, manifests: list[ShardManifest]) -> None:
    """SHA256SUMS of the set's own files and of the shards of these manifests.

    A tar was hashed when it was written, and what was signed before this build keeps its hash: damage stays visible.
    Raises ShardError if a tar or index is missing.
    """
    known = {shard_name(m.scale, m.shard, "tar"): m.sha256 for m in manifests}
    if (folder / UNFINISHED).exists():
        known |= parse_sums((folder / UNFINISHED).read_bytes())[0]
    names = [name for m in manifests for name in shard_files(m.scale, m.shard)]
    for name in names:
        if not (folder / name).is_file():
            raise ShardError(
                f"{folder / name} is missing: run the same `cxrfast shard` command again to build it again"
            )
    sums = {name: known.get(name) or sha256(folder / name) for name in (*names, *SET_FILES)}
    write_bytes(folder / "SHA256SUMS", sums_bytes(sums))
    (folder / UNFINISHED).unlink(missing_ok=True)


def mark_unfinished(folder: Path, rebuilt: Iterable[str]) -> None:
    """Mark a finished set as unfinished; the hashes of its shards are kept, but for those of the files `rebuilt`.

    Raises ShardError if set.json or rows.parquet is not what was signed.
    """
    for earlier in (folder / UNFINISHED, folder / "SHA256SUMS"):
        if earlier.exists():
            break
    else:
        return
    try:
        sums, wrong = parse_sums(earlier.read_bytes())
    except FileNotFoundError:
        return  # another part of the build was quicker
    damaged = [name for name in sums if name in ("set.json", "rows.parquet") and sha256(folder / name) != sums[name]]
    if wrong and earlier.name == "SHA256SUMS":
        damaged.append(earlier.name)
    if damaged:
        raise ShardError(f"{folder / damaged[0]} is damaged: mend it first, with `cxrfast verify --repair {folder}`")
    leave = {*SET_FILES, *rebuilt}
    kept = {name: digest for name, digest in sums.items() if name not in leave}
    write_bytes(folder / UNFINISHED, sums_bytes(kept))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def read_sums(folder: Path, name: str = "SHA256SUMS") -> dict[str, str]:
    """{relative path: sha256}. Raises ShardError if the set was never finished."""
    path = folder / name
    if not path.is_file():
        check_labels_settled(folder)
        raise ShardError(
            f"{folder} is not finished (no SHA256SUMS): run the same `cxrfast shard` or `cxrfast stage` command again"
        )
    sums, wrong = parse_sums(path.read_bytes())
    if wrong:
        raise ShardError(f"{path} is damaged ({wrong[0]}): `cxrfast verify --repair {folder}` writes it anew")
    return sums


def parse_sums(data: bytes) -> tuple[dict[str, str], list[str]]:
    """{relative path: sha256} of the lines that can be read, and what is wrong with the others."""
    sums: dict[str, str] = {}
    wrong = []
    *lines, end = data.decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        digest, name = line[:64], line[66:]
        if line[64:66] != "  " or not re.fullmatch("[0-9a-f]{64}", digest) or not NAMES.fullmatch(name) or name in sums:
            wrong.append(f"line {number} is no hash and name of a file")
        else:
            sums[name] = digest
    if list(sums) != sorted(sums):
        wrong.append("its lines are out of order")
    if end or not lines:
        wrong.append("no newline at its end")
    return sums, wrong
