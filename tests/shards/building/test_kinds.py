"""The first look at the files asks for everything that they need, in one message and before anything is written."""

import sys
from pathlib import Path

import numpy as np
import pytest
from commands import invoke
from dicoms import radiograph, written
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.building.kinds import SAMPLED, kind_of, sample
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.decode import encode

TABLE = {"source": "table", "source_options": {"table": "t.csv", "label": ["Edema"]}}
PIXELS = np.tile(np.arange(64, dtype=np.uint16) * 60, (64, 1))


def write(tree: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    lines = [f"{name},p{n},1" for n, name in enumerate(files)]
    (tree / "t.csv").write_text("\n".join(["path,patient_id,Edema", *lines]) + "\n")
    return tree


@pytest.fixture
def mixed(tmp_path):
    """96 JPEGs, and in a folder of their own four DICOM files: two native, one JPEG 2000, one lossless JPEG."""
    picture = encode(PIXELS.astype(np.uint8), 95)
    files = {f"a/{n:02}.jpg": picture for n in range(96)}
    for n, syntax in enumerate(("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1", JPEG_2000, LOSSLESS)):
        files[f"b/{n}.dcm"] = in_syntax(syntax)
    return write(tmp_path / "tree", files)


JPEG_2000, LOSSLESS = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70"


def in_syntax(syntax: str) -> bytes:
    """A DICOM file whose header names a transfer syntax of the same length."""
    data = written(radiograph(PIXELS, 12))
    native = b"1.2.840.10008.1.2.1\0"
    assert data.count(native) == 1
    text = syntax.encode() + b"\0" * (len(syntax) % 2)
    at = data.index(native)
    return data[: at - 2] + len(text).to_bytes(2, "little") + text + data[at + len(native) :]


@pytest.mark.parametrize("dry_run", [True, False])
def test_packages_and_the_grey_transform_are_asked_for_at_once(mixed, tmp_path, monkeypatch, dry_run):
    for module in ("pydicom", "openjpeg", "libjpeg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ShardError) as caught:
        build(mixed, tmp_path / "set", [16], dry_run=dry_run, **TABLE)
    assert str(caught.value) == (
        "DICOM files need pydicom and pylibjpeg-libjpeg and pylibjpeg-openjpeg: pip install 'cxrfast[dicom]'; and a grey "
        "transform: --grey mimic (as MIMIC-CXR-JPG was made) or --grey window (as a viewer shows them). 4 of 100 files looked "
        "at are DICOM, such as b/0.dcm"
    )
    assert not (tmp_path / "set").exists()


def test_only_what_is_lacking_is_asked_for(mixed, tmp_path, monkeypatch):
    with pytest.raises(ShardError, match=r"^DICOM files need a grey transform: --grey mimic"):
        build(mixed, tmp_path / "set", [16], dry_run=True, **TABLE)
    monkeypatch.setitem(sys.modules, "openjpeg", None)
    with pytest.raises(
        ShardError, match=r"^DICOM files need pylibjpeg-openjpeg: pip install 'cxrfast\[dicom\]'\. 4 of"
    ):
        build(mixed, tmp_path / "set", [16], dry_run=True, recipe=ImageRecipe(grey="window"), **TABLE)


def test_a_set_that_is_complete_needs_no_decoder(tmp_path, monkeypatch):
    tree = write(tmp_path / "tree", {f"{n}.dcm": written(radiograph(PIXELS, 12)) for n in range(3)})
    build(tree, tmp_path / "set", [16], recipe=ImageRecipe(grey="window"), **TABLE)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert build(tree, tmp_path / "set", [16], recipe=ImageRecipe(grey="window"), **TABLE).complete


def test_a_dry_run_counts_the_kinds(tmp_path):
    picture = encode(PIXELS.astype(np.uint8), 95)
    tree = write(
        tmp_path / "tree", {"a.jpg": picture, "b.jpg": picture, "c.tif": b"II*\0" + bytes(99), "d.jpg": b"text"}
    )
    report = build(tree, tmp_path / "set", [16], dry_run=True, **TABLE)
    assert report.kinds == {"JPEG": 2, "TIFF": 1, "neither image nor DICOM": 1}
    assert "files looked at: 2 JPEG, 1 TIFF, 1 neither image nor DICOM" in report.lines(tmp_path / "set")


def test_kinds_are_told_by_the_first_bytes_also_without_a_preamble():
    whole = written(radiograph(PIXELS, 12))
    assert {kind_of(data).name for data in (whole, whole[128:], whole[132:])} == {"DICOM"}
    assert kind_of(in_syntax(JPEG_2000)).packages == ("pydicom", "pylibjpeg", "pylibjpeg-openjpeg")
    twelve_bits = in_syntax("1.2.840.10008.1.2.4.51")
    assert "pylibjpeg-libjpeg" in kind_of(twelve_bits).packages
    assert kind_of(in_syntax("1.2.840.10008.1.2.4.50")).packages == ("pydicom",)
    assert kind_of(b"").name == "neither image nor DICOM"


def test_every_suffix_is_sampled_and_files_are_spread_over_folders():
    paths = [f"p{n // 1000:03}/{n}.jpg" for n in range(100_000)] + ["odd/x.PNG", "odd/y.png", "odd/1.2.840.7", "odd/z"]
    chosen = sample(paths)
    assert {"odd/x.PNG", "odd/1.2.840.7"} < set(chosen)
    assert len({path.split("/")[0] for path in chosen}) > 50
    assert len(chosen) <= SAMPLED + 4


def test_doctor_lists_the_optional_decoders():
    output = invoke("doctor").output
    for package in ("pydicom", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg"):
        assert package in output
