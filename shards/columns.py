"""Kept so that sources written for earlier versions still import: `read_table` is in `cxrfast.shards.sources.table_files`."""

from cxrfast.shards.sources.table_files import read_table

__all__ = ["read_table"]
