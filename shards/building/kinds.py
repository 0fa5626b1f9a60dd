"""Look at the first bytes of a sample of the source files, and ask for everything that they need before a build starts."""

import posixpath
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

from cxrfast.errors import ShardError
from cxrfast.shards.images.decode import UNSUPPORTED, with_preamble
from cxrfast.shards.images.png import BIT_DEPTH, SIGNATURE
from cxrfast.shards.storage import Tree

HEAD = 8192
"""Bytes of each file; the transfer syntax of a DICOM file is in its first few hundred."""

SAMPLED = 192
"""Files looked at, about; more only if there are more suffixes."""

SYNTAX = b"\x02\x00\x10\x00UI"
"""Start of the element that holds the transfer syntax (PS3.10, section 7.1), always explicit and little-endian."""

BITS_STORED = b"\x28\x00\x01\x01US\x02\x00"

NEEDS_OPENJPEG = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)}
NEEDS_LIBJPEG = {f"1.2.840.10008.1.2.4.{n}" for n in (57, 70, 80, 81)}
EXTENDED = "1.2.840.10008.1.2.4.51"
"""JPEG of 8 or 12 bits; pylibjpeg-libjpeg decodes those of 12."""

GREY = "a grey transform: --grey mimic (as MIMIC-CXR-JPG was made) or --grey window (as a viewer shows them)"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the first bytes of a file say."""

    name: str
    packages: tuple[str, ...] = ()
    """What decodes it, apart from what cxrfast always has."""

    @property
    def is_dicom(self) -> bool:
        return "pydicom" in self.packages


MODULES = {
    "pydicom": "pydicom",
    "pylibjpeg": "pylibjpeg",
    "pylibjpeg-libjpeg": "libjpeg",
    "pylibjpeg-openjpeg": "openjpeg",
}
"""Optional decoders: the module of each package."""


def kind_of(head: bytes) -> Kind:
    """The kind of a file by its first bytes."""
    if head.startswith(b"\xff\xd8"):
        return Kind(name="JPEG")
    if head.startswith(SIGNATURE):
        return Kind(name=f"PNG of {head[BIT_DEPTH]} bits" if len(head) > BIT_DEPTH else "PNG")
    if dicom := with_preamble(head):
        return _dicom(dicom)
    return Kind(name=next((name for start, name in UNSUPPORTED if head.startswith(start)), "neither image nor DICOM"))


def _dicom(head: bytes) -> Kind:
    at = head.find(SYNTAX)
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    syntax = head[at + 8 : at + 8 + length].decode("ascii", "replace").strip("\0 ") if at >= 0 else ""
    bits = head.find(BITS_STORED)
    is_deep = bits >= 0 and int.from_bytes(head[bits + 8 : bits + 10], "little") > 8
    if syntax in NEEDS_OPENJPEG:
        return Kind(name="DICOM (JPEG 2000)", packages=("pydicom", "pylibjpeg", "pylibjpeg-openjpeg"))
    if syntax in NEEDS_LIBJPEG or (syntax == EXTENDED and is_deep):
        return Kind(name="DICOM (lossless or 12-bit JPEG)", packages=("pydicom", "pylibjpeg", "pylibjpeg-libjpeg"))
    return Kind(name="DICOM", packages=("pydicom",))


def sample(paths: Iterable[str]) -> list[str]:
    """Paths of every suffix, spread over the folders."""
    by_suffix: dict[str, list[str]] = {}
    for path in sorted(paths):
        suffix = posixpath.splitext(path)[1].lower()
        by_suffix.setdefault("" if suffix[1:].isdecimal() else suffix, []).append(path)  # a UID ends in a number
    each = max(1, SAMPLED // max(1, len(by_suffix)))
    return [path for some in by_suffix.values() for path in some[:: -(-len(some) // each)]]


def look_at_kinds(tree: Tree, paths: Iterable[str], grey: str) -> dict[str, int]:
    """Numbers of sampled files by kind. Raises ShardError that asks for every package and option that they need."""

    def look(path: str) -> Kind | None:
        try:
            return kind_of(tree.head(path, HEAD))
        except OSError:  # the build itself reports it
            return None

    chosen = sample(paths)
    with ThreadPoolExecutor(16) as pool:
        found = {path: kind for path, kind in zip(chosen, pool.map(look, chosen), strict=True) if kind}
    dicom = [path for path, kind in found.items() if kind.is_dicom]
    used = {package for kind in found.values() for package in kind.packages}
    missing = [package for package in MODULES if package in used and find_spec(MODULES[package]) is None]
    needs = [f"{' and '.join(missing)}: pip install 'cxrfast[dicom]'"] if missing else []
    needs += [GREY] if dicom and grey == "none" else []
    if needs:
        raise ShardError(
            f"DICOM files need {'; and '.join(needs)}. {len(dicom):,} of {len(found):,} files looked at are DICOM, such as "
            f"{dicom[0]}"
        )
    counts = Counter(kind.name for kind in found.values())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
