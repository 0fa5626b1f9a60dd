"""Benchmarks that print ratios, measured interleaved in one run."""
