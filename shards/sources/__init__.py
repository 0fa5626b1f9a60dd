"""Source trees: which images they list, with which labels."""

from cxrfast.shards.sources.source import Source

__all__ = ["Source"]
