"""Effective receptive fields of runs: stored, read, refused and drawn."""

from dataclasses import replace

import numpy as np
import pytest
from runs import SMALL, make_untrained

from cxrfast.analysis import maps
from cxrfast.analysis.receptive_field import erf, erf_figure, erf_size, has_erf, read_erf
from cxrfast.errors import RunError
from cxrfast.models import receptive_field as fields
from cxrfast.runs.run import Run

PARTS = ["train"] * 4 + ["val"] * 4 + ["test"] * 4


def test_a_runs_field_is_stored_and_measured_again_it_is_the_same(tiny_set, tmp_path):
    run = make_untrained(tmp_path, tiny_set, PARTS)
    with pytest.raises(RunError, match="cxrfast erf"):
        read_erf(run)
    assert not has_erf(run)
    first = erf(run, images=3)
    assert has_erf(run)
    stored = read_erf(Run.open(run.folder))
    np.testing.assert_array_equal(stored.map, first.map)
    assert replace(stored, map=first.map) == first
    assert (stored.map.shape, stored.map.dtype, stored.map.max()) == ((64, 64), np.float32, 1)
    assert (stored.images, stored.fraction) == (3, stored.size / 64)
    assert stored.theoretical == fields.theoretical_receptive_field(SMALL)[0]
    assert f"ERF {stored.size:.0f} px" in stored.in_words()
    np.testing.assert_array_equal(erf(run, images=3).map, first.map)
    assert not np.array_equal(erf(run, images=3, seed=1).map, first.map)
    other = replace(run, config=replace(run.config, seed=1))
    assert not has_erf(other)
    with pytest.raises(RunError, match="another run"):
        read_erf(other)


def test_batch_size_does_not_change_the_field(tiny_set, tmp_path, monkeypatch):
    run = make_untrained(tmp_path, tiny_set, PARTS)
    whole = erf(run)
    monkeypatch.setattr(maps, "BATCH_PIXELS", 1)
    np.testing.assert_allclose(erf(run).map, whole.map, atol=1e-4)
    assert whole.images == 4  # all there are


def test_another_set_and_a_run_without_validation_images_or_weights_are_refused(tiny_set, raw_set, tmp_path):
    run = make_untrained(tmp_path, tiny_set, PARTS)
    with pytest.raises(RunError, match=f"trained on set {run.config.set_id}.*--shards"):
        erf(run, shards=raw_set)
    with pytest.raises(RunError, match="at least one validation image, not 0 of 4"):
        erf(run, images=0)
    (run.folder / "best.safetensors").unlink()
    with pytest.raises(RunError, match="train it first"):
        erf(run)
    assert not (run.folder / "maps.zarr").exists()


def test_the_figure_has_a_panel_a_scale_with_its_numbers(tiny_set, tmp_path):
    runs = [make_untrained(tmp_path, tiny_set, PARTS, scale, fold) for scale, fold in ((64, 0), (32, 0), (64, 1))]
    measured = {(run.config.scale, run.config.fold): erf(run, images=2) for run in runs}
    drawn = erf_figure(runs)
    drawn.savefig(tmp_path / "erf.png")
    titles = [axes.get_title() for axes in drawn.axes if axes.get_title()]
    assert len(titles) == 2
    assert titles[0].startswith(f"32 px: ERF {measured[32, 0].size:.0f} px, {100 * measured[32, 0].fraction:.0f} %")
    mean = (measured[64, 0].map + measured[64, 1].map) / 2
    assert titles[1].startswith(f"64 px: ERF {erf_size(mean):.0f} px")
    assert "2 folds" in titles[1]
    with pytest.raises(RunError, match="no runs"):
        erf_figure([])
