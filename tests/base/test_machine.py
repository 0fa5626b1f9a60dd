"""Cores, memory and OpenMP's settings as this process gets them."""

import os
import subprocess
import sys

import psutil
import pytest

from cxrfast.machine import memory_bytes, processor, resident_bytes, usable_cores

OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")

PROBE = f"""
import os, subprocess, sys
from cxrfast.cli.main import cli

@cli.command()
def probe():
    assert "torch" not in sys.modules
    subprocess.run([sys.executable, "-c", "import os; print([os.environ.get(name) for name in {OPENMP!r}])"], check=True)

cli(["probe"])
"""

LAUNCHER = """
import os, subprocess, sys
os.environ.update(OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="none")  # as torchrun does for several workers
subprocess.run([sys.executable, "-c", "from cxrfast.machine import user_sets_threads; print(user_sets_threads())"], check=True)
"""


def run(code: str, **given: str) -> str:
    """Output of a Python process with these of the variables that OpenMP reads, and no others."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | given
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, [None, "3000", None]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "1"}, ["ACTIVE", None, "1"]),
        ({"GOMP_SPINCOUNT": "5"}, [None, "5", None]),
    ],
)
def test_a_command_and_its_children_have_openmp_threads_sleep_unless_the_user_says_otherwise(given, seen):
    assert run(PROBE, **given) == str(seen)


def test_a_program_that_imports_the_package_keeps_its_openmp_settings():
    code = f"import os, cxrfast; cxrfast.Loader; print([name for name in {OPENMP!r} if name in os.environ])"
    assert run(code) == "[]"


def test_the_user_s_number_of_threads_is_told_from_torchrun_s():
    assert run(LAUNCHER) == "False"
    assert run(LAUNCHER, OMP_NUM_THREADS="1") == "True"
    assert run("from cxrfast.machine import user_sets_threads; print(user_sets_threads())") == "False"


def test_cores_are_those_that_the_scheduler_lends():
    assert 1 <= usable_cores() <= os.cpu_count()
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from cxrfast.machine import usable_cores; print(usable_cores())"
    )
    assert run(code) == "1"


def test_memory_is_no_more_than_the_machine_has_and_resident_memory_counts_children():
    alone = resident_bytes()
    assert 0 < alone < memory_bytes() <= psutil.virtual_memory().total
    script = "data = bytearray(b'x' * 10**8); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert resident_bytes() > alone + 5 * 10**7
        child.communicate(b"\n")


def test_the_processor_has_a_name():
    assert processor()
