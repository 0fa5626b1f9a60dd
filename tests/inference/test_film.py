"""New films are prepared as a build prepares its images: bit for bit, whatever the set was built with."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dicoms import radiograph, shapes, written
from pictures import saved, smooth
from PIL import Image
from sets import REAL, build

from cxrfast.distributed import World
from cxrfast.inference.ensemble import Member, ScaleEnsemble
from cxrfast.inference.film import prepared
from cxrfast.models.classifier import Classifier
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.training.predict import score

SCALES = (32, 64)


def wide_png(image: np.ndarray) -> bytes:
    return saved(Image.fromarray(image), "PNG")


def source(folder: Path, kind: str) -> Path:
    """A folder of twelve images of sizes of their own, with a table."""
    folder.mkdir()
    lines = ["file,patient,flag"]
    for i in range(12):
        height, width = 70 + 13 * i, 150 - 7 * i
        if kind == "dicom":
            data = written(radiograph(shapes(height, width), PhotometricInterpretation=f"MONOCHROME{1 + i % 2}"))
        elif kind == "wide":
            data = wide_png(shapes(height, width) * 16)
        elif kind == "colour":
            data = saved(Image.fromarray(smooth(height, width, 3, seed=i)), "JPEG", quality=90)
        else:
            data = saved(Image.fromarray(smooth(height, width, seed=i)), "JPEG", quality=95)
        (folder / f"{i}.img").write_bytes(data)
        lines.append(f"{i}.img,p{i},{i % 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def built(folder: Path, out: Path, recipe: ImageRecipe) -> Path:
    options = {"table": str(folder / "table.csv"), "label": ["flag"], "patient_column": "patient"}
    build(folder, out, list(SCALES), source="table", source_options=options, recipe=recipe)
    return out


KINDS = [
    ("grey", ImageRecipe(codec="raw")),
    ("grey", ImageRecipe(quality=95)),
    ("colour", ImageRecipe(quality=60)),
    ("grey", ImageRecipe(resize="pad")),
    ("wide", ImageRecipe()),
    ("wide", ImageRecipe(grey="mimic", codec="raw")),
    ("dicom", ImageRecipe(grey="mimic")),
    ("dicom", ImageRecipe(grey="window", resize="pad")),
]


@pytest.mark.parametrize(("kind", "recipe"), KINDS, ids=[f"{k}-{r.codec}-{r.resize}-{r.grey}" for k, r in KINDS])
def test_source_files_have_the_pixels_and_logits_of_the_sets_own_rows(tmp_path, kind, recipe):
    folder = source(tmp_path / "source", kind)
    shards = built(folder, tmp_path / "set", recipe)
    rows = pd.read_parquet(shards / "rows.parquet")
    torch.manual_seed(0)
    networks = {scale: Classifier("shufflenet_v2_x0_5", 1).eval() for scale in SCALES}
    ensemble = ScaleEnsemble(
        labels=["flag"],
        recipe=recipe,
        members=[Member(name=f"{s}", scale=s, fold=0, network=networks[s], micro_batch=5) for s in SCALES],
        weights={0: np.array([[0.5, 0.5]])},
    )
    films = [ensemble.prepare(folder / path) for path in rows["path"]]
    assert len({film.images[64].tobytes() for film in films}) == 12 or kind in ("wide", "dicom")
    with torch.inference_mode():
        scores = ensemble({s: torch.from_numpy(np.stack([film.images[s] for film in films]))[:, None] for s in SCALES})
    for scale in SCALES:
        with Reader(shards, scale) as reader:
            order, sizes = EvalOrder(rows=reader.rows, micro_batch=5), reader.shard_set.manifest(scale, 0).sizes
            stored = torch.cat([batch.image for batch in Loader(reader, order)])[:, 0].numpy()
            of_rows = score(
                networks[scale], Loader(reader, order), World(torch.device("cpu")), "fp32", lambda n=1, note="": None
            )
        np.testing.assert_array_equal(np.stack([film.images[scale] for film in films]), stored)
        np.testing.assert_array_equal(scores.logits[f"{scale}"].numpy(), of_rows.logits)
    assert [[film.height, film.width] for film in films] == sizes


@pytest.mark.skipif(not (REAL / "dicom").is_dir(), reason="the real radiographs are not here")
def test_real_dicom_and_png_files_are_films():
    for path in [*(REAL / "dicom").iterdir(), *(REAL / "single").iterdir()]:
        film = prepared(path, [64], ImageRecipe(grey="mimic"))
        assert film.images[64].std() > 20
        assert min(film.height, film.width) > 200


def test_a_dicom_file_says_what_to_do_where_the_set_has_no_transform():
    with pytest.raises(BadImage, match=r"its --grey is none.*convert the file") as caught:
        prepared(written(radiograph(shapes())), [32], ImageRecipe())
    assert caught.value.reason == Reason.UNSUPPORTED


def test_a_16_bit_file_that_uses_few_of_its_levels_is_remarked_on():
    film = prepared(wide_png(shapes(64, 64)), [32], ImageRecipe())
    assert film.remarks == ("16-bit PNG that uses less than a quarter of its range",)
