import subprocess
import sys

import torch

from cxrfast.doctor import examine


def test_the_doctor_names_what_matters_and_finds_this_machine_fit() -> None:
    found = {f.what: f for f in examine()}
    assert {
        "Python",
        "torch",
        "DALI",
        "processor",
        "memory",
        "precision",
        "ImageNet weights",
        "shard set",
    } <= found.keys()
    assert not any(f.is_problem for f in found.values())
    assert found["torch"].found == torch.__version__.partition("+")[0]


def test_the_doctor_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cxrfast", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cxrfast doctor" in done.stdout
