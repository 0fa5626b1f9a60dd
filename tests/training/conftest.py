"""A short training that several tests look at."""

import pytest
from trainings import SHORT

from cxrfast.config import Runtime
from cxrfast.training.setup import make_config
from cxrfast.training.train import train


@pytest.fixture(scope="session")
def trained(tiny_set, tmp_path_factory):
    """A finished run of one epoch. Not to be written to."""
    runtime = Runtime(shards=tiny_set, runs=tmp_path_factory.mktemp("trained"), device="cpu")
    return train(make_config(tiny_set, 32, device="cpu", **SHORT), runtime)
