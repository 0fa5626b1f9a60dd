"""Kept so that sources written for earlier versions still import: `read_table` is in `cxrfast.shards.sources.tables`."""

from cxrfast.shards.sources.tables import read_table

__all__ = ["read_table"]
