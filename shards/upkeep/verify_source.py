"""Compare the images of a source tree with its publisher's SHA256SUMS.txt. Reads only."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256 as new_sha256
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.machine import usable_cores
from cxrfast.progress import progress
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import source_hashes
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.format.source_hashes import SIZE
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem, hashing_speed

LINE = re.compile(r"([0-9a-f]{64}) [ *]?(.+)")
"""A line of SHA256SUMS.txt: PhysioNet writes one space, sha256sum two."""


@dataclass(frozen=True, kw_only=True)
class SourceVerdict:
    files: int
    bytes: int
    seconds: float
    problems: list[Problem]

    def summary(self, tree: Tree) -> str:
        found = f"{len(self.problems):,} problems" if self.problems else "as listed in SHA256SUMS.txt"
        return f"{tree}: {self.files:,} files, {hashing_speed(self.bytes, self.seconds)}: {found}"


def verify_source(folder: Path, tree: Tree) -> SourceVerdict:
    """Compare a set's source images, and all other files in the tree's SHA256SUMS.txt, with that list.

    An image as listed may be another than the set was built from: then its hash differs from the one in the manifests.
    Raises ShardError if SHA256SUMS.txt is missing or unreadable.
    """
    read_set(folder)
    rows = read_rows(folder / "rows.parquet")
    try:
        text = tree.read("SHA256SUMS.txt").decode()
    except FileNotFoundError:
        raise ShardError(f"{tree} has no SHA256SUMS.txt to compare it with: download it next to the tables") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"SHA256SUMS.txt in {tree} cannot be read ({error}): download it again") from error
    matches = [LINE.fullmatch(line) for line in text.splitlines() if line.strip()]
    if not all(matches) or not matches:
        raise ShardError(f"SHA256SUMS.txt in {tree} is not a list of hashes and names: download it again")
    sums = {m[2].removeprefix("./"): m[1] for m in matches if m}
    present = rows.loc[rows["bytes"] >= 0, "path"]
    problems = [Problem(path, "not listed in SHA256SUMS.txt") for path in present if path not in sums]

    paths = rows["path"].tolist()
    built_from = {paths[row]: known for m in ShardSet(folder).manifests() for row, known in source_hashes(m).items()}

    def look(name: str) -> tuple[int, str]:
        try:
            data = tree.read(name)
        except FileNotFoundError:
            return 0, "missing"
        except OSError as error:
            return 0, f"cannot be read ({error.strerror or error})"
        found = new_sha256(data)
        if found.hexdigest() != sums[name]:
            return len(data), "its bytes have changed"
        is_same = built_from.get(name, b"") in (b"", found.digest()[:SIZE])
        return len(data), "" if is_same else "is as listed, but the set was built from other bytes"

    total, start = 0, time.monotonic()
    with (
        ThreadPoolExecutor(2 * usable_cores()) as pool,
        progress("hashing the source", len(sums), unit="files") as advance,
    ):
        for name, (size, what) in zip(sums, pool.map(look, sums), strict=True):
            total += size
            if what:
                problems.append(Problem(name, what))
            advance()
    return SourceVerdict(files=len(sums), bytes=total, seconds=time.monotonic() - start, problems=problems)
