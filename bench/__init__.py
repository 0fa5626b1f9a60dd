"""How fast: benchmarks that print ratios, measured interleaved in one run."""
