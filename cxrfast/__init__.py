"""Train chest X-ray classifiers at full resolution without waiting for I/O."""

__version__ = "0.1.0"
