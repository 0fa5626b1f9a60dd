"""Bytes in motion: row numbers become uint8 grey batches on the device."""
