import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cxrfast.config import TrainConfig
from cxrfast.report import report
from cxrfast.runs import Run, start_run
from cxrfast.shards.rows import read_rows
from cxrfast.store import Predictions, write_predictions
from cxrfast.train import select_rows


def make_runs(shards: Path, runs: Path, predicted: bool = True) -> list[Run]:
    """Runs at two scales and two folds with logits drawn around the truth."""
    rng = np.random.default_rng(0)
    table = read_rows(shards / "rows.parquet")
    made = []
    for scale in (32, 64):
        for fold in (0, 1):
            labels = tuple(table.columns[12:])
            config = TrainConfig(
                set_id="s", scale=scale, labels=labels, fold=fold, global_batch=8, micro_batch=8, learning_rate=1e-4
            )
            rows = select_rows(table, config, table["row"].to_numpy())
            run = start_run(runs / f"densenet121-{scale}" / f"fold-{fold}", config, shards, rows)
            for epoch in range(3):
                run.add_metrics(
                    {
                        "epoch": epoch,
                        "train_loss": 0.5 - 0.1 * epoch,
                        "val_loss": 0.6 - 0.1 * epoch,
                        "val_auroc": None,
                        "val_auroc_by_label": {},
                        "learning_rate": 1e-4,
                        "seconds": 1.0,
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
                write_predictions(run, parts)
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
    assert "undefined" in html
    assert html.count("data:image/png;base64,") >= 3
    for patient in made[0].rows()["patient_id"].unique():
        assert patient not in re.sub(r"base64,[^\"]*", "", html)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["auroc.png", "learning.png", "weights.png"]


def test_parts_that_were_not_made_name_the_command_that_makes_them(tiny_set: Path, tmp_path: Path) -> None:
    make_runs(tiny_set, tmp_path, predicted=False)
    html = report(tmp_path).read_text()
    for command in ("cxrfast predict", "cxrfast erf", "cxrfast gradcam"):
        assert command in html


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
