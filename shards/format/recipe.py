"""The recipe of a set's images: codec, size, grey."""

from dataclasses import dataclass

from cxrfast.errors import ShardError

CODECS = ("jpeg", "raw")
RESIZES = ("squash", "pad")
GREYS = ("none", "mimic", "window")
QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """All that the pixels of a set depend on except the images themselves."""

    seed: int = 0
    """Seed of the permutation of rows and of the splits."""
    codec: str = "jpeg"
    """How pixels lie in the tars: `jpeg`, or `raw`, uncompressed; see `format.codec`."""
    quality: int | None = None
    """Quality of the JPEGs, 1 to 100; None becomes 95. Raw pixels have none: there it stays None, so that no two raw sets differ by it."""
    resize: str = "squash"
    """`squash`: both sides become the scale, whatever the aspect (the study); `pad`: centred on a black square."""
    grey: str = "none"
    """How images deeper than 8 bit become grey: `none` (full range), `mimic` or `window`; see `images.decode`."""

    def __post_init__(self) -> None:
        for name, known in (("codec", CODECS), ("resize", RESIZES), ("grey", GREYS)):
            if getattr(self, name) not in known:
                raise ShardError(f"{name} {getattr(self, name)!r} is unknown: use {' or '.join(known)}")
        if self.codec == "jpeg" and self.quality is None:
            object.__setattr__(self, "quality", QUALITY)
        if self.codec != "jpeg" and self.quality is not None:
            raise ShardError(
                f"--quality {self.quality} is of JPEG, and --codec {self.codec} stores every pixel as it is: "
                "leave one of them out"
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ShardError(f"--quality {self.quality} is not between 1 and 100")
        if not 0 <= self.seed < 2**63:
            raise ShardError(f"--seed {self.seed} is not between 0 and 2^63 - 1")
