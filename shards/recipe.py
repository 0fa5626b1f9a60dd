"""What the pixels of a set depend on beside the images themselves."""

from dataclasses import dataclass

from cxrfast.errors import ShardError

RESIZES = ("squash", "pad")
GREYS = ("none", "mimic", "window")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the pixels of a set depend on beside the images themselves."""

    seed: int = 0
    """Of the permutation of rows and of the splits."""
    codec: str = "jpeg"
    quality: int = 95
    resize: str = "squash"
    """`squash`: both sides become the scale, whatever the aspect (the study); `pad`: centred on a black square."""
    grey: str = "none"
    """How images deeper than 8 bit become grey: `none` (full range), `mimic` or `window`; see `images.decode`."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ShardError(f"--quality {self.quality} is not between 1 and 100")
        for name, known in (("codec", ("jpeg",)), ("resize", RESIZES), ("grey", GREYS)):
            if getattr(self, name) not in known:
                raise ShardError(f"{name} {getattr(self, name)!r} is unknown: use {' or '.join(known)}")
        if not 0 <= self.seed < 2**63:
            raise ShardError(f"--seed {self.seed} is not between 0 and 2^63 - 1")
