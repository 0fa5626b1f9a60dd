import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run
from runs import make_run, metrics_line

from cxrfast.analysis.evaluate import evaluate
from cxrfast.analysis.report import auroc_figure, learning_figure, report
from cxrfast.runs.run import Run


def make_runs(runs: Path, whole: bool = False) -> list[Run]:
    """Trained runs at two scales and two folds; `whole`: they predicted, and 64 px started from the runs at 32 px."""
    made = []
    for scale in (32, 64):
        for fold in (0, 1):
            weights = str(runs / "densenet121-32" / f"fold-{fold}") if whole and scale == 64 else "none"
            run = make_run(runs, scale, fold, quality=scale / 32 if whole else None, weights=weights)
            for epoch, rate in enumerate((1e-4, 1e-4, 5e-5)):
                run.add_metrics(metrics_line(epoch, learning_rate=rate, seconds=600.0 * scale / 32))
            run.set_state("done", epoch=3)
            made.append(run)
    return made


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The report of whole runs."""
    runs = tmp_path_factory.mktemp("runs")
    make_runs(runs, whole=True)
    return report(runs)


def test_the_report_is_one_file_that_names_images_by_id_alone(drawn):
    html, run = drawn.read_text(), Run.open(drawn.parent / "densenet121-32" / "fold-0")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html), "nothing is loaded from elsewhere"
    headings = re.findall(r"<h2>(.*)</h2>", html)
    assert {"Runs", "AUROC on the test rows", "Ensemble of scales", "Learning curves"} <= set(headings)
    assert headings[-4:] == ["Effective receptive fields", "Grad-CAM", "Time and memory", "Configuration"]
    assert "Undefined everywhere: Fracture (no positive or no negative test row)." in html
    assert "<td>Fracture" not in html
    assert html.count("data:image/png;base64,") >= 3
    text = re.sub(r"base64,[^\"]*", "", html)
    for name in ("patient_id", "image_id"):
        assert not re.search(rf"\b{run.rows()[name].iloc[0]}\b", text)
    assert sorted(p.name for p in (drawn.parent / "figures").iterdir()) == ["auroc.png", "learning.png", "weights.png"]


WITHOUT_TORCH = """
import sys
from pathlib import Path

from cxrfast.analysis import evaluate, report

evaluate.evaluate(Path(sys.argv[1]))
sys.exit("torch" in sys.modules)
"""


def test_tables_and_report_read_no_ids_and_load_no_torch_to_do_so(tmp_path):
    runs = make_runs(tmp_path, whole=True)
    files = [tmp_path / name for name in ("evaluation/auroc.csv", "ensemble/weights.csv", "ensemble/auroc.csv")]
    report(tmp_path)
    whole = [path.read_bytes() for path in files]
    for one in runs:
        one.rows().drop(columns=["image_id", "patient_id"]).to_parquet(one.rows_path, index=False)
    report(tmp_path)
    assert [path.read_bytes() for path in files] == whole
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, tmp_path], check=True)


def test_the_figure_draws_defined_findings_and_no_bar_beyond_one(tmp_path):
    for fold, quality in ((0, 0.1), (1, 9.0)):
        make_run(tmp_path, 64, fold, quality=quality)
    result = evaluate(tmp_path)
    mean, sd = (f(result.matrix("densenet121-64")[:, 0]) for f in (np.mean, lambda values: np.std(values, ddof=1)))
    assert mean + sd > 1, "the bar would reach beyond"
    (axes,) = auroc_figure(result).axes
    assert sorted(axes.get_legend_handles_labels()[1]) == ["Edema", "Lung Lesion", "Pneumonia"]
    for container in axes.containers:
        for bar in container.lines[2][0].get_segments():
            assert bar[:, 1].min() >= 0
            assert bar[:, 1].max() <= 1


def test_scales_without_a_common_fold_are_not_drawn_in_one_figure(tmp_path):
    for scale, fold in ((32, 0), (64, 1)):
        make_run(tmp_path, scale, fold)
    html = report(tmp_path).read_text()
    assert "No fold is in every column: the columns do not compare" in html
    assert "AUROC by resolution" not in html


def test_parts_that_were_not_made_name_the_command_and_an_epoch_without_a_rate_is_left_out_of_the_median(tmp_path):
    first, *_ = make_runs(tmp_path)
    first.add_metrics({**first.metrics()[-1], "epoch": 3, "images_per_s": None})
    html = report(tmp_path).read_text()
    for command in ("predict", "erf", "gradcam"):
        assert f"<code>cxrfast {command} {tmp_path}" in html
    assert '<td class="number">100.0</td>' in html
    assert "†" not in html, "nothing started from another run"


def test_learning_curves_run_over_epochs_and_over_time_with_the_drops_of_the_rate(tmp_path):
    made = make_runs(tmp_path)
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


def test_scales_that_started_from_another_run_are_marked(drawn):
    html = drawn.read_text()
    assert html.count("† weights started from the run of a smaller scale: densenet121-64 from densenet121-32.") >= 5
    for marked in ("densenet121-64/fold-0†", "densenet121-64†", "64 px†"):
        assert marked in html
    assert "densenet121-32/fold-0†" not in html


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_shows_the_report_and_its_pictures(drawn, tmp_path):
    probe = tmp_path / "probe.html"
    script = (
        "<script>window.onload = () => document.body.dataset.seen = [...document.images]"
        ".filter(i => i.complete && i.naturalWidth > 300).length + ' of ' + document.images.length</script>"
    )
    probe.write_text(drawn.read_text().replace("</body>", script + "</body>"))
    switches = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    options = [*switches.split(), "disable-sync", f"user-data-dir={tmp_path / 'profile'}", "virtual-time-budget=5000"]
    done = run("chromium", *(f"--{option}" for option in options), "--dump-dom", probe.as_uri())
    seen = re.search(r'data-seen="(\d+) of (\d+)"', done.stdout)
    assert seen, done.stderr[-2000:]
    assert seen[1] == seen[2]
    assert int(seen[1]) >= 3
