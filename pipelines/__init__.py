"""Data in memory: row numbers become uint8 grey batches on the device."""
