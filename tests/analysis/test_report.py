import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cxrfast.analysis.report import learning_figure, report
from cxrfast.config import TrainConfig
from cxrfast.runs.run import Predictions, Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.training.setup import select_rows


def make_runs(shards: Path, runs: Path, predicted: bool = True, curriculum: bool = False) -> list[Run]:
    """Runs at two scales and two folds with logits drawn around the truth."""
    rng = np.random.default_rng(0)
    table = read_rows(shards / "rows.parquet")
    made = []
    for scale in (32, 64):
        for fold in (0, 1):
            labels = tuple(table.columns[12:])
            config = TrainConfig(
                set_id="s",
                scale=scale,
                labels=labels,
                fold=fold,
                global_batch=8,
                micro_batch=8,
                learning_rate=1e-4,
                weights=str(runs / "densenet121-32" / f"fold-{fold}") if curriculum and scale == 64 else "none",
            )
            rows = select_rows(table, config, table["row"].to_numpy())
            run = Run.start(runs / f"densenet121-{scale}" / f"fold-{fold}", config, shards, rows)
            for epoch in range(3):
                run.add_metrics(
                    {
                        "epoch": epoch,
                        "train_loss": 0.5 - 0.1 * epoch,
                        "val_loss": 0.6 - 0.1 * epoch,
                        "val_auroc": None,
                        "val_auroc_by_label": {},
                        "learning_rate": 1e-4 if epoch < 2 else 5e-5,
                        "seconds": 600.0 * scale / 32,
                        "images_per_s": 100.0,
                        "waiting_share": 0.01,
                        "resident_bytes": 2**30,
                        "gpu_peak_bytes": None,
                    }
                )
            run.set_state("done", epoch=3)
            parts = {}
            for part in ("val", "test"):
                chosen = rows[rows["part"] == part]
                truth = np.nan_to_num(chosen[list(labels)].to_numpy())
                logits = truth * scale / 32 + rng.normal(size=truth.shape)
                parts[part] = Predictions(chosen["row"].to_numpy(np.int64), logits.astype(np.float32))
            if predicted:
                run.write_predictions(parts)
            made.append(run)
    return made


def test_the_report_is_one_file_that_names_images_by_id_alone(tiny_set: Path, tmp_path: Path) -> None:
    made = make_runs(tiny_set, tmp_path)
    path = report(tmp_path)
    html = path.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html), "nothing is loaded from elsewhere"
    for heading in (
        "Runs",
        "AUROC on the test rows",
        "Ensemble of scales",
        "Learning curves",
        "Grad-CAM",
        "Configuration",
    ):
        assert f"<h2>{heading}</h2>" in html
    assert "Undefined everywhere: " in html
    assert html.count("data:image/png;base64,") >= 3
    for patient in made[0].rows()["patient_id"].unique():
        assert patient not in re.sub(r"base64,[^\"]*", "", html)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["auroc.png", "learning.png", "weights.png"]


def test_an_epoch_that_has_no_rate_is_left_out_of_the_median(tiny_set: Path, tmp_path: Path) -> None:
    first, *_ = make_runs(tiny_set, tmp_path, predicted=False)
    first.add_metrics({**first.metrics()[-1], "epoch": 3, "images_per_s": None})
    assert '<td class="number">100.0</td>' in report(tmp_path).read_text()


def test_parts_that_were_not_made_name_the_command_that_makes_them(tiny_set: Path, tmp_path: Path) -> None:
    make_runs(tiny_set, tmp_path, predicted=False)
    html = report(tmp_path).read_text()
    for command in ("cxrfast predict", "cxrfast erf", "cxrfast gradcam"):
        assert command in html


def test_learning_curves_run_over_epochs_and_over_time_with_the_drops_of_the_rate(
    tiny_set: Path, tmp_path: Path
) -> None:
    made = make_runs(tiny_set, tmp_path, predicted=False)
    figure = learning_figure(made)
    above, below = figure.axes[:3], figure.axes[3:]
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch"] * 3 + ["minutes"] * 3
    for axes in figure.axes:
        curves, ticks = axes.get_lines()[::2], axes.get_lines()[1::2]
        assert len(curves) == len(ticks) == len(made)
        for curve, tick in zip(curves, ticks, strict=True):
            assert len(curve.get_xdata()) == 3
            np.testing.assert_array_equal(tick.get_xdata(), curve.get_xdata()[2:])
            np.testing.assert_array_equal(tick.get_ydata(), curve.get_ydata()[2:])
    np.testing.assert_allclose(above[1].get_lines()[0].get_ydata(), [0.6, 0.5, 0.4])
    assert np.isnan(above[2].get_lines()[0].get_ydata()).all(), "an AUROC that is undefined has no point"
    assert [list(axes.get_lines()[0].get_xdata()) for axes in (above[0], below[0])] == [[1, 2, 3], [10, 20, 30]]
    colours = [line.get_color() for line in above[0].get_lines()[::2]]
    assert colours[0] == colours[1] != colours[2] == colours[3], "folds of a scale share theirs"
    made[0].add_metrics({**made[0].metrics()[-1], "epoch": 3, "seconds": 7200.0})
    assert learning_figure(made).axes[3].get_xlabel() == "hours"


def test_scales_that_started_from_another_run_are_marked(tiny_set: Path, tmp_path: Path) -> None:
    make_runs(tiny_set, tmp_path / "plain")
    assert "†" not in report(tmp_path / "plain").read_text()
    make_runs(tiny_set, tmp_path, curriculum=True)
    html = report(tmp_path).read_text()
    assert html.count("† weights started from the run of a smaller scale: densenet121-64 from densenet121-32.") >= 5
    for marked in ("densenet121-64/fold-0†", "densenet121-64†", "64 px†"):
        assert marked in html
    assert "densenet121-32/fold-0†" not in html


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_shows_the_report_and_its_pictures(tiny_set: Path, tmp_path: Path) -> None:
    make_runs(tiny_set, tmp_path / "runs")
    path = report(tmp_path / "runs")
    probe = tmp_path / "probe.html"
    script = (
        "<script>window.onload = () => document.body.dataset.seen = [...document.images]"
        ".filter(i => i.complete && i.naturalWidth > 300).length + ' of ' + document.images.length</script>"
    )
    probe.write_text(path.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = re.search(r'data-seen="(\d+) of (\d+)"', done.stdout)
    assert seen, done.stderr[-2000:]
    assert seen[1] == seen[2]
    assert int(seen[1]) >= 3
