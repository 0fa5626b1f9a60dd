import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from html import unescape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, run
from markdown_it import MarkdownIt
from PIL import Image, PngImagePlugin
from runs import LABELS, make_run, metrics_line, rewrite_config, study_rows

from cxrfast.analysis.chapters import shareable
from cxrfast.analysis.curves import auroc_figure, learning_figure
from cxrfast.analysis.ensemble import ensemble
from cxrfast.analysis.evaluate import evaluate
from cxrfast.analysis.report import report
from cxrfast.errors import RunError
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


def test_the_report_is_one_file_that_names_no_image(drawn):
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
        assert f"<code>cxrfast {command} RUNS/densenet121-32/fold-0" in html
    assert str(tmp_path) not in html
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
        ".filter(i => i.complete && i.naturalWidth > 300).length + ' of ' + document.images.length"
        " + ', width ' + getComputedStyle(document.body).maxWidth</script>"
    )
    policy = "default-src 'none'; "  # lets no script run; the rest of it is what is tested
    text = drawn.read_text().replace(policy, f"{policy}script-src 'unsafe-inline'; ")
    probe.write_text(text.replace("</body>", script + "</body>"))
    shown = browse(probe, tmp_path)
    seen = re.search(r'data-seen="(\d+) of (\d+), width (\w+)"', shown)
    assert seen, shown[-2000:]
    assert seen[1] == seen[2]
    assert int(seen[1]) >= 3
    assert seen[3] == "1180px", "the policy lets the style sheet apply"


def browse(page: Path, folder: Path) -> str:
    """What chromium makes of a page, as HTML."""
    switches = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    options = [*switches.split(), "disable-sync", f"user-data-dir={folder / 'profile'}", "virtual-time-budget=5000"]
    return run("chromium", *(f"--{option}" for option in options), "--dump-dom", page.as_uri()).stdout


# What a report must not tell, and must not ask for


class Loads(HTMLParser):
    """Attributes and texts of a page that make a browser ask for something."""

    LOADING = ("src", "srcset", "href", "poster", "data", "background", "action", "formaction", "ping", "xlink:href")
    TAGS = ("script", "link", "base", "iframe", "object", "embed", "form", "video", "audio", "source", "svg", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policy = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            known = (tag == "a" and name == "href" and value[:2] == "#s") or (
                (tag, name) == ("img", "src") and value.startswith("data:image/png;base64,")
            )
            if (name in self.LOADING and not known) or name.startswith("on") or (name == "style"):
                self.found.append(f"<{tag} {name}={value!r}>")
        given = dict(attributes)
        if tag == "meta" and "http-equiv" in given:
            assert given["http-equiv"] == "Content-Security-Policy"
            self.policy = given["content"]
        if tag in self.TAGS:
            self.found.append(f"<{tag}>")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.found += re.findall(r"url\(|@import|expression\(", data)


def fetching(address: str) -> list[str]:
    """Labels that are requests where they are taken for Markdown, HTML or CSS."""
    return [
        f"![x]({address}/1.png)",
        f"<img src={address}/2.png>",
        f"</td><script src={address}/3.js></script>",
        f'"><link rel=stylesheet href={address}/4.css>',
        f"</style><style>@import '{address}/5.css';",
        f"<iframe src={address}/6.html>",
    ]


def hostile_runs(runs: Path, labels: list[str]) -> list[Run]:
    """Runs at two scales and two folds whose first labels have these names."""
    names = dict(zip(LABELS, labels, strict=False))
    labels = tuple(names.get(label, label) for label in LABELS)
    made = []
    for scale in (32, 64):
        for fold in (0, 1):
            rows = study_rows(fold).rename(columns=names)
            one = make_run(runs, scale, fold, rows, labels=labels, quality=scale / 32)
            one.add_metrics(metrics_line(0))
            one.set_state("done", epoch=1)
            made.append(one)
    return made


def test_no_name_makes_a_report_or_a_table_ask_for_anything(tmp_path):
    for number in range(0, 6, 3):
        runs = tmp_path / f"{number}"
        labels = fetching("http://127.0.0.1:9")[number : number + 3]
        hostile_runs(runs, labels)
        page = Loads(report(runs).read_text())
        assert not page.found
        assert page.policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
        assert "unsafe" not in page.policy
        for path in (runs / "evaluation" / "auroc.md", runs / "ensemble" / "summary.md"):
            html = MarkdownIt("commonmark").enable("table").render(path.read_text())
            assert not re.search("<(img|script|link|style|iframe|a)\\b", html)
            assert html.count(labels[0].replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;"))
    assert Loads(f"<img src='{fetching('http://h')[0]}'>").found, "the check can fail"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_that_opens_the_report_asks_for_nothing(tmp_path):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        labels = fetching(f"http://127.0.0.1:{server.server_port}")
        for number in range(0, 6, 3):
            runs = tmp_path / f"{number}"
            hostile_runs(runs, labels[number : number + 3])
            browse(report(runs), tmp_path)
        assert not asked
        policy = re.search('<meta http-equiv="Content.*>', (runs / "report.html").read_text())[0]
        body = "".join(labels[1:])
        (tmp_path / "with.html").write_text(f"<!doctype html>{policy}{body}")
        browse(tmp_path / "with.html", tmp_path)
        assert not asked, "the policy alone stops it"
        (tmp_path / "without.html").write_text(f"<!doctype html>{body}")
        browse(tmp_path / "without.html", tmp_path)
        assert "/2.png" in asked, "this test can fail"
        server.shutdown()


def test_nothing_that_is_shared_names_a_folder_a_host_or_a_user(tmp_path, monkeypatch):
    runs = tmp_path / "home" / "jane.smith" / "secret-project" / "runs"
    made = make_runs(runs, whole=True)
    for one in made[:2]:  # a run of an earlier version knows only the path of its first weights
        rewrite_config(one, weights=str(tmp_path / "home" / "jane.smith" / "best.safetensors"))
        known = json.loads(one.config_path.read_bytes())
        del known["origin"]
        one.config_path.write_text(json.dumps(known))
    for one in made:
        group = json.loads((one.predictions_path / "zarr.json").read_bytes())
        group["attributes"]["config_hash"] = Run.open(one.folder).hash
        (one.predictions_path / "zarr.json").write_text(json.dumps(group))
    picture = PngImagePlugin.PngInfo()
    picture.add_text("Author", "jane.smith")
    path = made[0].gradcam_path("Edema")
    Image.new("RGB", (400, 300)).save(path, pnginfo=picture)
    assert b"jane.smith" in path.read_bytes()
    monkeypatch.chdir(runs.parent)
    for folder in (Path("runs"), runs, Path("../secret-project/runs")):
        evaluate(folder)
        ensemble(folder)
        html = report(folder).read_text()
        assert html.count("data:image/png") >= 4
        shared = [runs / "report.html", *runs.glob("evaluation/*"), *runs.glob("ensemble/*"), *runs.glob("figures/*")]
        assert len(shared) >= 12
        for file in shared:
            data = file.read_bytes()
            text = re.sub(rb'base64,[^"]*', b"", data) if file.suffix == ".html" else data
            for secret in ("jane", "smith", "secret", str(tmp_path), socket.gethostname() + "."):
                assert secret.encode() not in text, (file, secret)
            assert file.suffix != ".png" or set(re.findall(b"[tiz]{1,2}(?:EXt|TXt|EXIf|IME)", data)) == set()
    assert not any(b"jane" in base64.b64decode(one) for one in re.findall(r'base64,([^"]*)', html))


def test_a_message_loses_its_folders(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    assert shareable(f"{runs}/a-32/fold-0/rows.parquet is damaged", runs) == "RUNS/a-32/fold-0/rows.parquet is damaged"
    assert shareable("set /home/jane/s/set.json: /etc/x", runs) == "set …/set.json: …/x"
    monkeypatch.chdir(tmp_path)
    assert shareable(f"runs in runs: {runs}/a", Path("runs")) == "runs in runs: RUNS/a"
    for same in ("1/2 of 3 px", "lr 1e-4/s", "densenet121-32/fold-0", "http://h/a/b"):
        assert shareable(same, runs) == same


def test_only_regular_figures_of_the_runs_own_findings_are_embedded(tmp_path, caplog):
    one, two, three, four = LABELS
    made = make_runs(tmp_path)[0]
    secret = tmp_path / "secret.png"
    Image.new("RGB", (50, 60), "red").save(secret)
    made.gradcam_path(one).symlink_to(secret)
    made.gradcam_path(two).write_bytes(b"<script>alert(1)</script>")
    os.mkfifo(made.gradcam_path(three))
    made.gradcam_path(four).write_bytes(secret.read_bytes()[:-20])
    (made.folder / "gradcam-mine.png").write_bytes(secret.read_bytes())
    html = report(tmp_path).read_text()
    for label, why in (
        (one, "is a link"),
        (two, "corrupt: not a PNG"),
        (three, "is not a regular file"),
        (four, "truncated"),
    ):
        assert f"{label}, densenet121-32/fold-0: {why}" in html
        assert str(made.gradcam_path(label)) in caplog.text
    assert html.count("data:image/png") == 1, "the learning curves alone"
    for label in LABELS[:3]:
        made.gradcam_path(label).unlink()
    shutil.copy(secret, made.gradcam_path(one))
    html = report(tmp_path).read_text()
    assert html.count("data:image/png") == 2
    assert "<figcaption>Edema, densenet121-32/fold-0</figcaption>" in html


def test_results_are_not_written_where_a_link_leads(tmp_path):
    make_runs(tmp_path / "runs", whole=True)
    (tmp_path / "elsewhere").mkdir()
    for name, command in (("evaluation", "evaluate"), ("ensemble", "ensemble"), ("figures", "report")):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "elsewhere")
        done = invoke(command, str(tmp_path / "runs"))
        assert done.exit_code == 2
        assert f"{name}: is a link" in done.output
        (tmp_path / "runs" / name).unlink()
    assert not list((tmp_path / "elsewhere").iterdir())


# Damaged runs


DAMAGES = {
    "config.json": lambda path: path.write_text("{"),
    "state.json": lambda path: path.write_text("[1]"),
    "metrics.jsonl": lambda path: path.write_text('{"epoch": "x"}\n'),
    "rows.parquet": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "predictions.zarr/zarr.json": lambda path: path.write_text("null"),
    "predictions.zarr/val/logits/zarr.json": lambda path: path.unlink(),
    "predictions.zarr/test/row/c/0": lambda path: path.write_bytes(b"junk"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_one_line_and_is_left_out_of_the_chapters(tmp_path, caplog, name):
    make_runs(tmp_path, whole=True)
    whole = report(tmp_path).read_text()
    one = Run.open(tmp_path / "densenet121-32" / "fold-1")
    DAMAGES[name](one.folder / name)
    done = invoke("report", str(tmp_path))
    assert done.exit_code == 0, done.output
    html = (tmp_path / "report.html").read_text()
    assert "densenet121-32/fold-1 is damaged and left out of the report: " in caplog.text
    assert '<td>densenet121-32/fold-1</td><td class="bold">damaged</td>' in html
    assert "densenet121-32/fold-1 is damaged and left out of all chapters: " in html
    for chapter in ("AUROC on the test rows", "Ensemble of scales", "Learning curves", "Time and memory"):
        section = re.search(f"<h2>{chapter}</h2>.*?</section>", html, re.S)[0]
        assert "<table" in section or "<img" in section, "the others are still told"
        assert "<td>densenet121-32/fold-1" not in section
    assert "Left out, damaged: densenet121-32/fold-1." in html
    assert "1 fold (0)" in html, "the scales are compared over the fold that both have"
    assert "damaged" not in whole
    for command in ("evaluate", "ensemble"):
        done = invoke(command, str(tmp_path))
        if not (command == "evaluate" and "val" in name) and name not in ("state.json", "metrics.jsonl"):
            assert done.exit_code == 2, done.output
            assert "densenet121-32/fold-1" in done.output
        assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "name", ["config.json", "state.json", "metrics.jsonl", "rows.parquet", "predictions.zarr", "maps.zarr"]
)
def test_a_pipe_in_place_of_a_file_hangs_nothing(tmp_path, name):
    make_runs(tmp_path, whole=True)
    path = tmp_path / "densenet121-32" / "fold-1" / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    html = report(tmp_path).read_text()
    assert ("damaged" in html) == (name not in ("predictions.zarr", "maps.zarr"))


def test_if_every_run_is_damaged_there_is_no_report(tmp_path):
    for one in make_runs(tmp_path):
        one.rows_path.unlink()
    with pytest.raises(
        RunError, match=r"no run in .* can be read; densenet121-32/fold-0: RUNS/dens.*rows.parquet is missing"
    ):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_finished_only_leaves_unfinished_runs_out_of_the_numbers(tmp_path):
    for scale in (256, 512):
        make_run(tmp_path, scale, 0)
        make_run(tmp_path, scale, 1, state="preempted")
    left_out = "Left out, unfinished: densenet121-256/fold-1, densenet121-512/fold-1."
    texts = {}
    for option in ("", "--finished-only"):
        done = invoke("report", tmp_path, *option.split())
        assert done.exit_code == 0, done.output
        texts[option] = unescape((tmp_path / "report.html").read_text())
    assert "unfinished, preempted after 1 of 100 epochs" in texts[""]
    assert left_out not in texts[""]
    assert texts["--finished-only"].count(left_out) >= 2, "in the chapters of the AUROCs and of the ensemble"
    assert "unfinished, preempted" not in texts["--finished-only"]
    assert "densenet121-256/fold-1" in texts["--finished-only"].split("<h2>")[1], "the first chapter lists every run"


def test_runs_that_cannot_be_joined_are_told_in_the_chapter(tmp_path):
    make_run(tmp_path, 32, 0, policy="u_ones")
    make_run(tmp_path, 64, 0)
    html = report(tmp_path).read_text()
    assert re.search("<h2>AUROC on the test rows</h2>\\s*<p>densenet121-32/fold-0 and .* cannot be joined", html)


GAPS = [
    '{"epoch": 0}',
    '{"epoch": 0, "val_loss": null, "seconds": null, "learning_rate": null}',
    '{"epoch": 0, "val_loss": NaN, "train_loss": Infinity, "val_auroc": NaN, "seconds": NaN, "resident_bytes": NaN}',
    '{"epoch": 0, "val_loss": -1, "train_loss": 0, "seconds": -5, "resident_bytes": [], "gpu_peak_bytes": {}}',
    '{"epoch": 7, "val_loss": 1e308, "train_loss": 1e-320, "val_auroc": 7, "seconds": 1e308, "learning_rate": 1e308}',
]
DAMAGE = [
    '{"epoch": 0, "learning_rate": "x"}',
    '{"epoch": 0, "val_auroc": true, "images_per_s": 1e999}',
    '{"epoch": -7}',
    f'{{"epoch": {10**400}, "val_loss": {10**400}, "seconds": {10**400}}}',
]


@pytest.mark.parametrize("line", [*GAPS, *DAMAGE])
def test_metrics_without_numbers_leave_gaps_and_wrong_ones_are_damage(tmp_path, line):
    for one in make_runs(tmp_path, whole=True)[:2]:
        one.metrics_path.write_text(f"{line}\n{json.dumps(metrics_line(1))}\n{line}\n")
    assert ("damaged" in report(tmp_path).read_text()) == (line in DAMAGE)
    assert invoke("status", str(tmp_path)).exit_code == 0
    for one in make_runs(tmp_path / "b"):
        one.metrics_path.write_text(f"{line}\n")
    assert invoke("report", str(tmp_path / "b")).exit_code == (2 if line in DAMAGE else 0)
