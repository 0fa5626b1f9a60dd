"""The zarr store of a run's maps keeps what it holds."""

import numpy as np
import pytest

from cxrfast.errors import RunError
from cxrfast.runs.arrays import open_arrays, update_arrays


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
