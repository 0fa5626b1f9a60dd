"""Source trees: the images and labels they list."""

from cxrfast.shards.sources.source import Source

__all__ = ["Source"]
