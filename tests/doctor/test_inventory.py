import os
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from commands import invoke, run

from cxrfast import distributed
from cxrfast.distributed import Dali, dali_build, find_dali
from cxrfast.doctor.inventory import Item, about_cuda, about_dali, examine
from cxrfast.pipelines import dali


def cuda(torch_cuda: str | None, dali_cuda: str, driver: int | None, torch_works: bool) -> dict[str, Item]:
    return {f.what: f for f in about_cuda(torch_cuda, Dali("2.4.0", dali_cuda), driver, torch_works)}


def problems(found: dict[str, Item]) -> list[str]:
    return [name for name, item in found.items() if item.is_problem]


def test_the_doctor_names_what_matters_and_finds_this_machine_fit():
    found = {f.what: f for f in examine()}
    named = {"Python", "torch", "DALI", "processor", "memory", "precision", "ImageNet weights", "shard set"}
    assert named <= found.keys()
    assert not any(f.is_problem for f in found.values())
    done = invoke("doctor")
    assert done.exit_code == 0, done.stderr
    assert "cxrfast doctor" in done.stdout
    assert found["torch"].found == torch.__version__.partition("+")[0]


@pytest.mark.skipif(not dali.available(), reason="DALI is not installed")
def test_dali_is_found_without_its_packages_metadata(monkeypatch):
    by_metadata, loaded = find_dali(), find_dali(load=True)

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(distributed, "version", absent)
    assert find_dali() == loaded
    assert by_metadata is not None
    assert loaded is not None
    assert by_metadata.version == loaded.version
    assert loaded.cuda.startswith(f"{by_metadata.cuda}.")
    assert dali_build() == f"{loaded.version} (CUDA {loaded.cuda})"


@pytest.mark.slow
def test_a_dali_that_does_not_load_is_a_problem(tmp_path):
    broken = tmp_path / "nvidia" / "dali" / "__init__.py"
    broken.parent.mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").write_text("__path__ = __import__('pkgutil').extend_path(__path__, __name__)")
    broken.write_text("raise ImportError('libdali.so: undefined symbol')")
    paths = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = run(sys.executable, "-m", "cxrfast", "doctor", PYTHONPATH=paths)
    assert done.returncode == 2, done.stdout
    for word in ("does not load", "undefined", "symbol"):  # the table may break lines within a message
        assert word in done.stdout
    assert "Traceback" not in done.stderr


def test_a_dali_before_2_1_is_a_problem_and_the_one_that_is_proposed_is_one_that_the_driver_serves():
    for version, is_problem in (("2.0.1", True), ("2.1.0", False), ("2.10.0", False)):
        assert about_dali(Dali(version, "12"), None).is_problem == is_problem
    for driver, wheel in ((None, "cuda120"), (535, "cuda120"), (580, "cuda130"), (590, "cuda130")):
        assert wheel in about_dali(None, driver).advice


def test_cuda_versions_that_differ_are_no_problem_under_a_driver_for_both():
    found = cuda("13.0", "12.9", 580, True)
    assert problems(found) == []
    assert "torch 13.0, DALI 12.9" in found["CUDA"].found
    assert "580 or newer" in found["CUDA"].advice
    assert "does not matter" in found["CUDA"].advice
    assert "does not matter" not in cuda("12.8", "12.9", 580, True)["CUDA"].advice


@pytest.mark.parametrize(
    ("torch_cuda", "dali_cuda", "driver", "torch_works", "too_old_for"),
    [
        ("12.8", "12.9", 525, False, []),
        ("12.8", "12.9", 470, False, ["driver for torch", "driver for DALI"]),
        ("13.0", "12.9", 570, False, ["driver for torch"]),
        ("12.8", "13.0", 570, False, ["driver for DALI"]),
        ("13.0", "13.0", 580, False, []),
        (None, "13.0", 535, False, ["driver for DALI"]),
        ("13.0", "12.9", None, False, []),
        ("13.0", "13.0", 535, True, []),  # a driver that torch can use serves DALI of the same CUDA
        ("12.8", "13.0", 535, True, ["driver for DALI"]),
    ],
)
def test_a_driver_too_old_for_torch_or_dali_is_a_problem(torch_cuda, dali_cuda, driver, torch_works, too_old_for):
    assert problems(cuda(torch_cuda, dali_cuda, driver, torch_works)) == too_old_for
