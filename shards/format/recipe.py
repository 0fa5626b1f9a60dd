"""How the images of a set are made: codec, size, grey."""

from dataclasses import dataclass

from cxrfast.errors import ShardError

CODECS = ("jpeg", "raw")
RESIZES = ("squash", "pad")
GREYS = ("none", "mimic", "window")
DCTS = ("accurate", "fast")
QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """Everything that the pixels of a set depend on, except the source images."""

    seed: int = 0
    """Seed of the permutation of rows and of the splits."""
    codec: str = "jpeg"
    """`jpeg`, or `raw` for uncompressed pixels; see `format.codec`."""
    quality: int | None = None
    """JPEG quality, 1 to 100; None becomes 95. Always None for raw pixels."""
    dct: str | None = None
    """JPEG encoder: `accurate`, or `fast`, which all sets had before the choice existed; None becomes accurate. Always None
    for raw pixels. An existing set keeps its own; see `images.decode.encode`."""
    resize: str = "squash"
    """`squash`: both sides become the scale, ignoring the aspect (the study); `pad`: centred on a black square."""
    grey: str = "none"
    """Conversion of images deeper than 8 bit: `none` (full range), `mimic` or `window`; see `images.decode`."""

    def __post_init__(self) -> None:
        for name, known in (("codec", CODECS), ("resize", RESIZES), ("grey", GREYS)):
            if getattr(self, name) not in known:
                raise ShardError(f"{name} {getattr(self, name)!r} is unknown: use {' or '.join(known)}")
        if self.codec == "jpeg" and self.quality is None:
            object.__setattr__(self, "quality", QUALITY)
        if self.codec != "jpeg" and self.quality is not None:
            raise ShardError(
                f"--quality {self.quality} is for JPEG, and --codec {self.codec} stores pixels uncompressed: "
                "leave one of them out"
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ShardError(f"--quality {self.quality} is not between 1 and 100")
        if self.codec == "jpeg" and self.dct is None:
            object.__setattr__(self, "dct", DCTS[0])
        if self.dct is not None and (self.codec != "jpeg" or self.dct not in DCTS):
            raise ShardError(f"dct {self.dct!r} is unknown: use {' or '.join(DCTS)}, for JPEG only")
        if not 0 <= self.seed < 2**63:
            raise ShardError(f"--seed {self.seed} is not between 0 and 2^63 - 1")
