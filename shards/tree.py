"""Kept so that sources written for earlier versions still import: `Tree` is in `cxrfast.shards.storage`."""

from cxrfast.shards.storage import Tree

__all__ = ["Tree"]
