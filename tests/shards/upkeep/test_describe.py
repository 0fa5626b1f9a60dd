import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from commands import invoke
from damage import contents, copy_set
from rich.console import Console
from sets import rows_of

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import REFERENCE, write_rows
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.shards.upkeep.counts import count_set
from cxrfast.shards.upkeep.describe import description_markdown, description_tables, figure, heading, write
from cxrfast.shards.upkeep.relabel import relabel
from cxrfast.training.setup import make_config, select_rows


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 phantoms: six damaged, one missing, one whose table gives another size, three in no official split."""
    tree = tmp_path_factory.mktemp("odd") / "mimic"
    synth(tree, images=80, size=64, corrupt=6, workers=1)
    out = tree.parent / "set"
    metadata = pd.read_csv(tree / "mimic-cxr-2.0.0-metadata.csv.gz")
    sound = [p for p in sorted(tree.rglob("*.jpg")) if cv2.imread(str(p), cv2.IMREAD_GRAYSCALE) is not None]
    sound[0].unlink()
    metadata.loc[metadata["dicom_id"] == sound[1].stem, "Rows"] += 1
    metadata.to_csv(tree / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    split = pd.read_csv(tree / "mimic-cxr-2.0.0-split.csv.gz")
    split[~split["dicom_id"].isin([p.stem for p in sound[2:5]])].to_csv(
        tree / "mimic-cxr-2.0.0-split.csv.gz", index=False
    )
    build(tree, out, [16, 32], workers=1, allow_missing=True, source_options={"allow_unmatched": True})
    return out


@pytest.fixture
def copy(odd: Path, tmp_path: Path) -> Path:
    return copy_set(odd, tmp_path / "set")


def counted(rows: pd.DataFrame) -> list[int]:
    """Images, studies, patients: pandas's way."""
    return [len(rows), rows["study_id"].nunique(), rows["patient_id"].nunique()]


def numbers(frame: pd.DataFrame, name: str, value: object) -> list[int]:
    return frame.loc[frame[name] == value, ["images", "studies", "patients"]].iloc[0].tolist()


def shown(folder: Path, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in description_tables(count_set(folder)):
        console.print(table.rich())
    console.file.close()
    return console.export_text()


# Right numbers


def test_splits_folds_and_views_are_those_of_pandas(odd):
    d, rows = count_set(odd), rows_of(odd)
    assert d.splits["split"].tolist() == ["train", "validate", "test", "none"]
    for split in d.splits["split"]:
        assert numbers(d.splits, "split", split) == counted(rows[rows["split"].fillna("none") == split])
    assert numbers(d.splits, "split", "none")[0] == 3
    for fold in range(5):
        parts = d.folds.query("fold == @fold")
        assert numbers(parts, "part", "test") == counted(rows[rows["fold"] == fold])
        assert numbers(parts, "part", "val") == counted(rows[(rows["fold"] != fold) & (rows["block"] == 2 * fold)])
        assert parts["images"].sum() == len(rows)
    for view in d.views["view"]:
        assert numbers(d.views, "view", view) == counted(rows[rows["view"] == view])


def test_every_state_of_every_label_is_counted_in_every_fold(odd):
    d, rows = count_set(odd), rows_of(odd)
    for fold in range(-1, 5):
        mine = rows if fold < 0 else rows[rows["fold"] == fold]
        lines = d.labels[d.labels["fold"] == fold].set_index("label")
        assert tuple(lines.index) == MIMIC
        for state, value in (("positive", 1), ("negative", 0), ("uncertain", -1)):
            assert lines[state].tolist() == (mine[list(MIMIC)] == value).sum().tolist()
        assert lines["blank"].tolist() == mine[list(MIMIC)].isna().sum().tolist()
    assert (d.labels[["positive", "negative", "uncertain", "blank"]].sum() > 0).all()


def test_the_last_step_is_what_training_uses(odd):
    d = count_set(odd)
    config = make_config(odd, 32, device="cpu", global_batch=8, precision="fp32")
    used = select_rows(rows_of(odd), config, Reader(odd, 32).rows)
    assert d.parts.set_index("part")["images"].to_dict() == used["part"].value_counts().to_dict()
    assert d.flow["images"].iloc[-1] == len(used)
    rows = rows_of(odd)
    for part in ("train", "val", "test"):
        chosen = used.loc[used["part"] == part, "row"]
        assert numbers(d.parts, "part", part) == counted(rows[rows["row"].isin(chosen)])


def test_what_is_left_out_is_counted_with_its_reasons(odd):
    d, rows = count_set(odd), rows_of(odd)
    assert d.flow["step"].tolist() == ["listed by the tables", "found in the tree", "readable", "with a label"]
    assert d.flow["images"].tolist()[:3] == [80, 79, 73]
    assert d.reasons.set_index("reason")["images"].to_dict() == {"truncated": 2, "empty": 2, "not an image": 2}
    held = rows[rows["row"].isin(Reader(odd, 32).rows)]
    assert numbers(d.flow, "step", "readable") == counted(held)
    assert numbers(d.flow, "step", "with a label") == counted(held[held[list(MIMIC)].notna().any(axis=1)])
    assert d.state == "complete"
    assert "from mimic; 14 labels; seed 0; complete." in heading(d)


def test_sizes_are_those_of_the_decoded_images_and_the_tables_where_there_is_none(odd):
    d, rows = count_set(odd), rows_of(odd)
    assert (d.decoded, d.differing, d.unknown) == (73, 1, 0)
    tree = odd.parent / "mimic"
    expected: dict[tuple[int, int], int] = {}
    for row in rows.itertuples():
        if row.row in Reader(odd, 32).rows:
            shape = decode_grey((tree / row.path).read_bytes()).shape
        else:
            shape = (row.height, row.width)
        expected[shape] = expected.get(shape, 0) + 1
    assert dict(zip(zip(d.sizes["height"], d.sizes["width"], strict=True), d.sizes["images"], strict=True)) == expected
    assert d.sizes["images"].is_monotonic_decreasing


def test_bytes_and_files_are_those_on_disk_and_the_codec_is_said_as_a_paper_would(odd, tiny_set, raw_set):
    for line in count_set(odd).scales.itertuples():
        files = list((odd / str(line.scale)).iterdir())
        assert line.files == len(files)
        assert line.bytes == sum(path.stat().st_size for path in files if path.suffix == ".tar")
        assert line.kB_per_image == pytest.approx(line.bytes / 1000 / 73)
        assert (line.rows, line.shards) == (73, read_set(odd).shards)
    assert "JPEG, quality 95, accurate DCT, squash; 1 kB" in description_markdown(count_set(tiny_set))
    assert "Raw (PGM), squash; 1 kB" in description_markdown(count_set(raw_set))


def test_a_radiologist_s_labels_are_counted_by_study(copy):
    rows = rows_of(copy)
    studies = sorted(rows["study_id"].unique())[:9]
    value = dict(zip(studies, [1, 1, 1, 0, 0, -1, np.nan, 1, 0], strict=True))
    rows[f"{REFERENCE}Edema"] = rows["study_id"].map(value).astype(np.float32)
    write_rows(copy / "rows.parquet", rows, read_set(copy))
    line = count_set(copy).references.iloc[0].to_dict()
    assert line == {"label": "Edema", "studies": 8, "positive": 4, "negative": 3, "uncertain": 1}
    assert "labelled by a radiologist" in shown(copy)
    assert tuple(count_set(copy).labels["label"].unique()) == MIMIC


# Sets of every kind


def test_a_set_that_is_planned_alone_says_so_and_without_known_sizes_gets_no_figure(copy, tmp_path):
    for scale in (16, 32):
        shutil.rmtree(copy / str(scale))
    (copy / "quarantine.csv").unlink()
    d = count_set(copy)
    assert d.state == "planned, no shard is built yet"
    assert numbers(d.flow, "step", "found in the tree")[0] == 79
    assert numbers(d.flow, "step", "in shards built so far") == [0, 0, 0]
    assert (d.decoded, d.unknown) == (0, 0)
    assert "Planned, no shard is built yet." in shown(copy)
    write_rows(copy / "rows.parquet", rows_of(copy).assign(height=0, width=0), read_set(copy))
    d = count_set(copy)
    assert d.unknown == 80
    assert write(d, copy, tmp_path / "out") == [tmp_path / "out" / "describe.md"]
    assert "80 images unknown" in (tmp_path / "out" / "describe.md").read_text()


def test_a_set_that_is_half_built_says_so_and_counts_what_is_there(copy):
    shards = read_set(copy).shards
    shard_path(copy, 16, shards - 1, "json").unlink()
    (copy / "SHA256SUMS").unlink()
    d = count_set(copy)
    assert d.state == f"not complete: {shards - 1} of {shards} shards at 16 px"
    assert d.flow["images"].tolist()[:3] == [80, 79, 73], "the other scale holds the rows"
    shard_path(copy, 32, shards - 1, "json").unlink()
    d = count_set(copy)
    first = (shards - 1) * read_set(copy).rows_per_shard
    rows = rows_of(copy).iloc[:first]
    assert numbers(d.flow, "step", "in shards built so far") == counted(rows[rows["bytes"] >= 0])
    assert numbers(d.flow, "step", "readable")[0] == len(Reader(copy, 32).rows)


def test_a_copy_without_its_scales_is_described_from_quarantine_csv_whose_damage_is_one_message(odd, copy):
    for scale in (16, 32):
        shutil.rmtree(copy / str(scale))
    here, there = count_set(copy), count_set(odd)
    for frame in ("flow", "reasons", "parts", "labels", "folds"):
        pd.testing.assert_frame_equal(getattr(here, frame), getattr(there, frame))
    assert here.decoded == 0
    assert here.scales.empty
    assert "manifests are not here" in here.state
    for text in ("row,path,reason\nx,a.jpg,empty\n", "row,path,reason\n99,a.jpg,empty\n", "\0\n1\n"):
        (copy / "quarantine.csv").write_text(text)
        with pytest.raises(ShardError, match=r"quarantine\.csv (is damaged|lists rows)"):
            count_set(copy)


def test_labels_of_other_names_without_a_positive_are_described(copy, tmp_path):
    images = rows_of(copy)["image_id"]
    pd.DataFrame({"image_id": images, "Ten | pipes [b]": 0, "never": ""}).to_csv(tmp_path / "t.csv", index=False)
    relabel(copy, tmp_path / "t.csv")
    lines = count_set(copy).labels.query("fold == -1").set_index("label")
    assert lines.loc["Ten | pipes [b]"].tolist() == [-1, 0, 80, 0, 0]
    assert lines.loc["never"].tolist() == [-1, 0, 0, 0, 80]
    assert numbers(count_set(copy).flow, "step", "with a label")[0] == 73, "a negative is a label"
    assert heading(count_set(copy)).count("from mimic; 2 labels from t.csv; seed") == 1
    assert "Ten | pipes [b]" in shown(copy)
    assert r"| Ten \| pipes \[b\] | 0 | 80 |" in description_markdown(count_set(copy))


def test_a_table_of_another_set_is_refused(copy, tiny_set):
    shutil.copy(tiny_set / "rows.parquet", copy / "rows.parquet")
    with pytest.raises(ShardError, match="cxrfast verify"):
        count_set(copy)


# What is shown


def test_it_needs_neither_torch_nor_dali_nor_tars(copy, tmp_path, monkeypatch):
    for tar in copy.rglob("*.tar"):
        tar.unlink()
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "nvidia.py").write_text("raise ImportError('no DALI here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = [sys.executable, "-m", "cxrfast", "describe", copy, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "80 images" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["describe.md", "sizes.png"]


def test_the_command_writes_a_table_and_a_figure_outside_the_set_and_never_into_it(copy, tmp_path):
    before = contents(copy)
    done = invoke("describe", copy, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for words in ("readable", "truncated", "official validate", "Enlarged Cardiomediastinum", "Height × width, px"):
        assert words in done.stdout
    picture = cv2.imread(str(tmp_path / "out" / "sizes.png"))
    assert picture is not None
    assert picture.std() > 10
    assert contents(copy) == before
    first = contents(tmp_path / "out")
    invoke("describe", copy, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == first, "the same set gives the same bytes"
    done = invoke("describe", copy, "--out", copy / "64")
    assert done.exit_code == 2
    assert "is inside the set" in done.stderr
    assert done.stdout == ""
    assert contents(copy) == before


def test_lines_fit_the_terminal_and_numbers_are_not_broken(odd):
    for width in (80, 100, 120):
        lines = shown(odd, width).splitlines()
        assert max(map(len, lines)) <= width
        assert any(line.split()[:2] == ["Edema", str(int((rows_of(odd)["Edema"] == 1).sum()))] for line in lines)


def test_the_figure_counts_every_image_once_on_axes_that_start_at_zero(odd):
    d = count_set(odd)
    panels = figure(d).axes
    mesh = panels[0].collections[0].get_array()
    assert mesh.sum() == 80
    assert panels[1].patches[0].get_data().values.sum() == 80
    assert panels[2].patches[0].get_data().values.sum() == 80
    assert panels[0].get_xlim() == panels[0].get_ylim()
    assert panels[0].get_xlim()[0] == 0
    box = panels[0].get_window_extent()
    assert box.width == pytest.approx(box.height)
    assert "px" in panels[0].get_xlabel()


def test_markdown_holds_every_count_a_fold(odd):
    text, d = description_markdown(count_set(odd)), count_set(odd)
    wide = d.labels.pivot(index="label", columns="fold", values="uncertain").loc["Pneumonia"]
    assert f"| Pneumonia | {' | '.join(map(str, wide))} |" in text.split("## Images uncertain")[1].split("##")[0]
    line = d.folds.query("fold == 3 and part == 'val'").iloc[0]
    assert f"| 3 val | {line['images']} | {line['studies']} | {line['patients']} |" in text
