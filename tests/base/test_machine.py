import os
import subprocess
import sys

import psutil
import pytest

from cxrfast.machine import memory_bytes, processor, resident_bytes, usable_cores


def test_cores_are_those_that_the_scheduler_lends():
    assert 1 <= usable_cores() <= os.cpu_count()
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    script = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from cxrfast.machine import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_memory_is_no_more_than_the_machine_has():
    assert 0 < resident_bytes() < memory_bytes() <= psutil.virtual_memory().total


def test_resident_memory_counts_children():
    alone = resident_bytes()
    script = "data = bytearray(b'x' * 10**8); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert resident_bytes() > alone + 5 * 10**7
        child.communicate(b"\n")


def test_the_processor_has_a_name():
    assert processor()
