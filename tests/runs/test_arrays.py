"""The zarr store of a run's maps keeps what it holds."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from runs import make_run

from cxrfast.analysis.evaluate import evaluate
from cxrfast.analysis.receptive_field import read_erf
from cxrfast.errors import RunError
from cxrfast.runs import arrays
from cxrfast.runs.arrays import open_arrays, read_array, update_arrays, write_arrays


def test_maps_of_one_kind_survive_the_writing_of_another(tmp_path):
    path, a, b = tmp_path / "maps.zarr", np.arange(6.0).reshape(2, 3), np.arange(4, dtype=np.int64)
    update_arrays(path, {"erf": a}, {"erf": {"seed": 1}})
    update_arrays(path, {"gradcam/Lung Opacity/rows": b}, {"gradcam/Lung Opacity": {"part": "test"}})
    update_arrays(path, {"erf": a + 1}, {"erf": {"seed": 2}})
    group = open_arrays(path)
    np.testing.assert_array_equal(group["erf"][:], a + 1)
    np.testing.assert_array_equal(group["gradcam/Lung Opacity/rows"][:], b)
    assert dict(group.attrs) == {"erf": {"seed": 2}, "gradcam/Lung Opacity": {"part": "test"}}


def test_maps_survive_a_process_killed_between_two_renames_and_damaged_ones_are_reported(tmp_path):
    path = tmp_path / "maps.zarr"
    update_arrays(path, {"erf": np.ones(3)}, {"erf": {}})
    path.rename(tmp_path / "maps.zarr.old")
    update_arrays(path, {"other": np.zeros(2)}, {})
    np.testing.assert_array_equal(open_arrays(path)["erf"][:], np.ones(3))
    (path / "erf" / "zarr.json").write_text("{")
    with pytest.raises(RunError, match="delete it"):
        update_arrays(path, {"other": np.zeros(2)}, {})
    assert (path / "erf").is_dir()


def test_an_array_is_one_file_until_it_is_large(tmp_path, monkeypatch):
    logits = np.arange(42, dtype=np.float32).reshape(6, 7)
    write_arrays(tmp_path / "whole.zarr", {"logits": logits, "none": logits[:0]}, {})
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 2 * logits[0].nbytes)
    write_arrays(tmp_path / "parts.zarr", {"logits": logits, "none": logits[:0]}, {})
    for name, files in (("whole", 1), ("parts", 3)):
        group = open_arrays(tmp_path / f"{name}.zarr")
        np.testing.assert_array_equal(read_array(group, "logits", ""), logits)
        assert read_array(group, "none", "").shape == (0, 7)
        chunks = [path for path in (tmp_path / f"{name}.zarr" / "logits" / "c").rglob("*") if path.is_file()]
        assert len(chunks) == files


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def make_old_array(folder: Path, trace: Path) -> None:
    """An array of zarr's version 2 whose only chunk is a pickle that leaves `trace`."""
    folder.mkdir(parents=True)
    filters = [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}]
    kind = {"shape": [1], "chunks": [1], "dtype": "|O", "fill_value": "", "order": "C", "compressor": None}
    (folder / ".zarray").write_text(json.dumps({"zarr_format": 2, **kind, "filters": filters}))
    (folder / "0").write_bytes(pickle.dumps(Trap(trace)))


@pytest.fixture
def unsafe(monkeypatch):
    """Pickles are read, as earlier versions of numcodecs did."""
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)


@pytest.mark.filterwarnings("ignore")  # of zarr, about what it would have read
def test_arrays_that_hold_pickles_are_refused_and_never_unpickled(tmp_path, unsafe):
    path, trace = tmp_path / "predictions.zarr", tmp_path / "trace"
    make_old_array(path / "row", trace)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(RunError):
        read_array(open_arrays(path), "row", "make it again")
    assert not trace.exists()


@pytest.mark.parametrize("root", ["old", "new"])
@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_predictions_and_maps_are_of_an_old_version_is_refused(tmp_path, unsafe, root):
    run, trace = make_run(tmp_path / "runs", 32), tmp_path / "trace"
    attributes = {"config_hash": run.hash, "set_id": run.config.set_id}
    for path in (run.predictions_path, run.maps_path):
        shutil.rmtree(path, ignore_errors=True)
        if root == "old":
            path.mkdir()
            (path / ".zgroup").write_text('{"zarr_format": 2}')
            (path / ".zattrs").write_text(json.dumps(attributes))
        else:
            zarr.open_group(path, mode="w", zarr_format=3).attrs.update({**attributes, "erf": attributes})
        for name in ("test/row", "test/logits", "val/row", "val/logits", "erf"):
            make_old_array(path / name, trace)
    with pytest.raises(RunError):
        evaluate(tmp_path / "runs")
    with pytest.raises(RunError):
        run.read_predictions("test")
    with pytest.raises(RunError):
        read_erf(run)
    assert not trace.exists()
