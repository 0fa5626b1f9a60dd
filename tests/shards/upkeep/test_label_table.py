import gzip
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from commands import invoke
from damage import contents
from sets import MIMIC_CHEXPERT, chexpert, is_as_planned, rows_of
from staging import web_server

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.format.info import read_set
from cxrfast.shards.upkeep.label_table import read_label_table
from cxrfast.shards.upkeep.relabel import relabel

# Columns


def test_of_a_table_with_known_findings_those_alone_are_taken_and_the_others_named(phantoms, folder, tmp_path):
    chexpert(phantoms)[["study_id", "Pneumonia"]].assign(Zebra=1, Weight=64).to_csv(tmp_path / "t.csv")
    arguments = ["relabel", str(folder), str(tmp_path / "t.csv")]
    done = invoke(*arguments)
    assert "not used: Zebra, Weight (name them with --label)" in done.stdout
    assert read_set(folder).labels == ["Pneumonia"]
    done = invoke(*arguments, "--label", "Zebra")
    assert "not used" not in done.stdout
    done = invoke(*arguments)
    assert read_set(folder).labels == ["Pneumonia", "Zebra"], "labels of the set are known, too"
    assert "not used: Weight (" in done.stdout


def test_columns_that_number_the_lines_are_no_labels(phantoms, folder, tmp_path):
    table = chexpert(phantoms)[["study_id"]].assign(ill=1).reset_index()
    assert table.columns[0] == "index"
    table.assign(**{"Unnamed: 0": 7, "Unnamed: 0.1": 7, "": 7, "肺炎": 0}).to_csv(tmp_path / "t.csv", index=False)
    relabel(folder, tmp_path / "t.csv")
    assert read_set(folder).labels == ["ill", "肺炎"]


@pytest.mark.parametrize("asked", [None, ["Airspace Opacity"], ["Lung Opacity"]])
def test_airspace_opacity_is_lung_opacity_unless_the_table_has_both(asked, phantoms, tiny_set, folder, tmp_path):
    table = chexpert(phantoms).rename(columns={"Lung Opacity": "Airspace Opacity"})
    table.to_csv(tmp_path / "t.csv", index=False)
    relabel(folder, tmp_path / "t.csv", labels=asked)
    assert read_set(folder).labels == (["Lung Opacity"] if asked else list(MIMIC))
    assert rows_of(folder)["Lung Opacity"].equals(rows_of(tiny_set)["Lung Opacity"])
    table.assign(**{"Lung Opacity": 0}).to_csv(tmp_path / "t.csv", index=False)
    relabel(folder, tmp_path / "t.csv", labels=asked)
    expected = {None: list(MIMIC), "Lung Opacity": ["Lung Opacity"], "Airspace Opacity": ["Airspace Opacity"]}
    assert read_set(folder).labels == expected[asked[0] if asked else None]


# Tables as they come


def save_as(kind: str, table: pd.DataFrame, folder: Path) -> str:
    if kind == "parquet, indexed by study":
        table.set_index("study_id").to_parquet(folder / "t.parquet")
    elif kind == "parquet, studies as floats, labels as whole numbers":
        table.astype({"study_id": float, **dict.fromkeys(MIMIC, "Int8")}).to_parquet(folder / "t.parquet")
    elif kind == "studies as floats":
        table.astype({"study_id": float}).to_csv(folder / "t.csv", index=False)
        assert ".0," in (folder / "t.csv").read_text().splitlines()[1]
    elif kind == "columns in another order":
        table[[*reversed(MIMIC), "study_id"]].to_csv(folder / "t.csv", index=False)
    elif kind == "an index without a name":
        table.to_csv(folder / "t.csv")
    elif kind == "memory":
        with fsspec.open("memory://tables/t.csv.gz", "wb") as file:
            file.write(gzip.compress(table.to_csv(index=False).encode()))
        return "memory://tables/t.csv.gz"
    elif kind == "zip":
        with zipfile.ZipFile(folder / "t.zip", "w") as archive:
            archive.writestr("labels/t.csv", table.to_csv(index=False))
        return f"zip://labels/t.csv::{folder / 't.zip'}"
    return str(next(folder.glob("t.*")))


@pytest.mark.parametrize(
    "kind",
    [
        "parquet, indexed by study",
        "parquet, studies as floats, labels as whole numbers",
        "studies as floats",
        "columns in another order",
        "an index without a name",
        "memory",
        "zip",
    ],
)
def test_the_same_table_in_another_form_gives_the_same_labels(kind, phantoms, tiny_set, folder, tmp_path):
    table = save_as(kind, chexpert(phantoms), tmp_path)
    relabel(folder, table)
    assert is_as_planned(folder, tiny_set, table)


@pytest.mark.parametrize("name", ["image_id", "dicom_id", "Image Index", "file"])
def test_a_table_may_be_keyed_by_image(name, tiny_set, folder, tmp_path):
    images = rows_of(tiny_set)[["image_id", *MIMIC]].rename(columns={"image_id": name}).sample(frac=1, random_state=1)
    images.to_csv(tmp_path / "t.csv", index=False)
    result = relabel(folder, tmp_path / "t.csv", key="file" if name == "file" else None)
    assert (result.by, result.key) == ("image_id", name)
    assert is_as_planned(folder, tiny_set, tmp_path / "t.csv")


def test_true_and_false_are_labels_and_known_columns_of_other_kinds_are_none(tiny_set, folder, tmp_path):
    studies = rows_of(tiny_set)[["study_id", "patient_id"]].drop_duplicates("study_id")
    table = studies.rename(columns={"patient_id": "Patient ID"})
    table = table.assign(split="train", ViewPosition="AP", Rows=3056, ill=[i % 2 == 0 for i in range(len(table))])
    for name in ("t.csv", "t.parquet"):
        table.to_csv(tmp_path / name, index=False) if name == "t.csv" else table.to_parquet(tmp_path / name)
        relabel(folder, tmp_path / name)
        assert read_set(folder).labels == ["ill"]
        ill = rows_of(folder).groupby("study_id")["ill"].first()[table["study_id"]]
        assert ill.tolist() == table["ill"].astype(float).tolist()


# Refused


def plain(table: pd.DataFrame) -> pd.DataFrame:
    return table[["study_id", "Edema", "Fracture"]]


REFUSED = {
    "no id column (Edema, Fracture): name the column of image ids, study ids or paths with --key": lambda t: t.drop(
        columns="study_id"
    ),
    "has the id columns dicom_id, study_id: ": lambda t: t.assign(dicom_id="x")[["dicom_id", *t.columns]],
    "only 1, 0, -1 and blank are known; name each label column with --label": lambda t: t.rename(
        columns={"Edema": "a", "Fracture": "b"}
    ).assign(Weight=64),
    "holds '0.5' for Edema in line 4": lambda t: t.assign(Edema=[1, 0, 0.5, *[1] * (len(t) - 3)]),
    "holds 'yes' for Fracture in line 2": lambda t: t.assign(Fracture=["yes", *["1"] * (len(t) - 1)]),
    "holds 'inf' for Fracture": lambda t: t.assign(Fracture=np.inf),
    "holds no lines": lambda t: t.iloc[:0],
    "has no label columns (study_id)": lambda t: t[["study_id"]],
    "study_id is blank in line 2": lambda t: t.assign(
        study_id=[None, *t["study_id"].iloc[1:].astype(str)],
        Edema=1,  # a line without any value is skipped
    ),
    "the table has ids like '1', the set has study_ids like '": lambda t: t.assign(study_id=range(1, len(t) + 1)),
    "'radiologist/Edema'": lambda t: t.rename(columns={"Edema": "radiologist/Edema"})[
        ["study_id", "radiologist/Edema"]
    ],
    "cannot hold all its digits": lambda t: t.assign(study_id=[f"12345678901234567{i}.0" for i in range(len(t))]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_table_that_cannot_be_right_is_refused_and_nothing_written(message, phantoms, folder, tmp_path):
    REFUSED[message](plain(chexpert(phantoms))).to_csv(tmp_path / "t.csv", index=False)
    before = contents(folder)
    with pytest.raises(ShardError) as caught:
        relabel(folder, tmp_path / "t.csv", unmatched=tmp_path / "unmatched.csv")
    assert message in str(caught.value)
    assert str(tmp_path / "t.csv") in str(caught.value)
    assert contents(folder) == before
    assert not (tmp_path / "unmatched.csv").exists()


@pytest.mark.parametrize("form", ["{}", "{}.0"])
def test_a_study_listed_twice_is_refused_and_named(form, phantoms, folder, tmp_path):
    table = plain(chexpert(phantoms))
    again = table.iloc[[3, 7, 9, 11]]
    twice = pd.concat(
        [table.astype(str), again.astype(str).assign(study_id=[form.format(i) for i in again["study_id"]])]
    )
    twice.replace("nan", "").to_csv(tmp_path / "t.csv", index=False)
    named = ", ".join(str(i) for i in again["study_id"].iloc[:3])
    with pytest.raises(
        ShardError, match=f"study_id of .* lists {named} and 1 more more than once: keep one line for each"
    ):
        relabel(folder, tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "accession"}, "has no column 'accession' (--key): its columns are study_id, Edema, Fracture"),
        ({"labels": ["Oedema"]}, "has no column 'Oedema' (--label)"),
        ({"labels": ["study_id"]}, "'study_id' of "),
    ],
)
def test_options_that_fit_no_column_are_refused(options, message, phantoms, folder, tmp_path):
    plain(chexpert(phantoms)).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ShardError) as caught:
        relabel(folder, tmp_path / "t.csv", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "no none.csv in . (its tables: broken.csv.gz, broken.parquet, here.csv)"),
        ("here.csv", "here.csv holds no lines"),
        ("set.json", "set.json"),
        ("broken.parquet", "broken.parquet"),
        ("broken.csv.gz", "broken.csv.gz"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_message(name, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set.json").write_text("{}")
    Path("here.csv").write_text("study_id,ill\n")
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    Path("broken.csv.gz").write_bytes(gzip.compress(b"study_id,a\n" * 99)[:-9])
    done = invoke("relabel", folder, name)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert message in " ".join(done.stderr.split())


def test_a_table_is_fetched_once(phantoms, tiny_set, folder):
    """Over HTTP, as from a data server."""
    with web_server(phantoms) as (url, asked):
        relabel(folder, f"{url}/{MIMIC_CHEXPERT}")
    assert asked == [f"/{MIMIC_CHEXPERT}"]
    assert is_as_planned(folder, tiny_set, f"{url}/{MIMIC_CHEXPERT}")


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_lines_of_a_label_table_are_those_of_the_file(tmp_path, ends):
    """Records of two lines and blank lines count as what they are; short lines and stray quotes are refused."""

    def read(text):
        (tmp_path / "t.csv").write_bytes(text.replace("\n", ends).encode("utf-8-sig"))
        return read_label_table(str(tmp_path / "t.csv"), ["Edema"], None, ["Edema"])

    text = "study_id,Edema,note\n" + "".join(f's{k},{k % 2},"a\nb"\n\n' for k in range(4))
    table = read(text)
    assert table.ids.index.tolist() == [2, 5, 8, 11]
    assert table.values["Edema"].tolist() == [0, 1, 0, 1]
    with pytest.raises(ShardError, match=r"holds '7' for Edema in line 8"):
        read(text.replace("s2,0", "s2,7"))
    with pytest.raises(ShardError, match=r"line 11 has 2 fields instead of the 3 of its header"):
        read(text.replace('s3,1,"a\nb"', "s3,1"))
    with pytest.raises(ShardError, match=r"quote opens in line 3 and closes in line 5, .*\(line 4\)"):
        read("study_id,Edema,note\ns1,0,a\n" + 's2,1,"a\ns3,1,b\ns4,1,c"\n')
    with pytest.raises(ShardError, match=r"t.csv is not UTF-8: line 3"):
        (tmp_path / "t.csv").write_bytes("study_id,Edema\ns1,1\nsé,1\n".replace("\n", ends).encode("latin-1"))
        read_label_table(str(tmp_path / "t.csv"), ["Edema"], None, ["Edema"])
