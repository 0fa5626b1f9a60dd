"""Decoded pixels against the means in the manifests: sound decoders pass, corrupting ones are caught and named."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from damage import change, copy_set, without_grids

from cxrfast.errors import LoadError
from cxrfast.pipelines import dali
from cxrfast.pipelines.dali import DaliEngine
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
from cxrfast.pipelines.proof import EVERY, UNKNOWN, Proof, cell_means, means_by_torch
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.images.cell_means import STEPS, grid, pack, unpack

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def load(folder: Path, stored: int, corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None, **options) -> Loader:
    """Loads all rows through DALI, proving; `corrupt` changes each batch (N, H, W, 1) as DALI's decoder hands it out."""
    reader = Reader(folder, stored)
    order = EvalOrder(rows=reader.rows, micro_batch=16)
    loader = Loader(reader, order, engine="dali", prove=True, threads=2, **options)
    if corrupt:
        compare = loader.proof.compare
        loader.proof.compare = lambda images, rows, means: compare(corrupt(images.clone()), rows, means)
    return loader


def read_all(loader: Loader) -> int:
    with closing(loader):
        return sum(len(batch.row) for batch in loader)


@needs_dali
@pytest.mark.parametrize("augment", [None, Augment()])
@pytest.mark.parametrize("size", [None, 32])
def test_sound_decoding_raises_no_alarm(either_set: Path, augment: Augment | None, size: int | None) -> None:
    assert read_all(load(either_set, 64, augment=augment, scale=size)) == 150


@pytest.mark.slow
@needs_dali
@pytest.mark.parametrize("scale", [64, 256, 1024])
def test_real_radiographs_raise_no_alarm(real_set: Path, scale: int) -> None:
    loader = load(real_set, scale)
    assert read_all(loader) == 237
    assert loader.proof.compared == 237
    assert 0 < loader.proof.largest < loader.proof.tolerance


def quarter_zeroed(images: torch.Tensor) -> torch.Tensor:
    images[:, :, : images.shape[2] // 2, : images.shape[3] // 2] = 0
    return images


CORRUPTIONS = {
    "all black": torch.zeros_like,
    "a quarter black": quarter_zeroed,
    "shifted": lambda images: images.roll(5, 2),
    "of neighbours": lambda images: images.roll(1, 0),
}


@needs_dali
@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
@pytest.mark.parametrize(
    ("fixture", "scale"), [("tiny_set", 64), pytest.param("real_set", 256, marks=pytest.mark.slow)]
)
def test_a_corrupting_decoder_is_caught_and_a_row_named(request, fixture: str, scale: int, corrupt) -> None:
    loader = load(request.getfixturevalue(fixture), scale, corrupt)
    says = rf"images that were decoded by DALI .* first row \d+ of .* at {scale} px: .* --engine host"
    with pytest.raises(LoadError, match=says):
        read_all(loader)


@needs_dali
def test_one_bad_image_among_all_is_found_and_is_the_one_that_is_named(tiny_set: Path) -> None:
    loader = load(tiny_set, 64, augment=Augment())
    compare = loader.proof.compare

    def spoil(images: torch.Tensor, rows: np.ndarray, means: np.ndarray) -> None:
        images = images.clone()
        images[torch.from_numpy(rows == 123)] = 0
        compare(images, rows, means)

    loader.proof.compare = spoil
    with pytest.raises(LoadError, match=r"^1 of the 150 images .* first row 123 of"):
        read_all(loader)


@needs_dali
def test_wrong_pixels_are_found_before_the_epoch_ends_if_asked(tiny_set: Path) -> None:
    loader = load(tiny_set, 64, torch.zeros_like)
    with closing(loader), closing(loader.epoch()) as batches:
        next(batches)
        assert "first row" in (loader.problem() or "")
        with pytest.raises(LoadError, match="first row"):
            loader.check()


@needs_dali
def test_a_set_without_grids_is_compared_with_the_host_on_some_rows(tiny_set: Path, tmp_path: Path) -> None:
    old = without_grids(copy_set(tiny_set, tmp_path / "old"))
    loader = load(old, 64)
    assert read_all(loader) == 150
    assert loader.proof.compared == len(range(0, 150, EVERY))
    assert loader.proof.unknown == 150
    with pytest.raises(LoadError, match="first row 0 of"):
        read_all(load(old, 64, torch.zeros_like))


@needs_dali
def test_wrong_means_in_a_manifest_are_not_blamed_on_the_decoder(folder: Path) -> None:
    path = folder / "64" / "000001.json"
    manifest = json.loads(path.read_bytes())
    grids = unpack(manifest["grids"], len(manifest["rows"])).copy()
    grids[3] = grids[4]
    change(path, grids=pack(grids))
    says = rf"do not match its images, first row {manifest['rows'][3]} at 64 px: `cxrfast"
    with pytest.raises(LoadError, match=says):
        read_all(load(folder, 64))


def test_rows_without_grids_are_unknown_except_for_some(tiny_set: Path, tmp_path: Path) -> None:
    with Reader(without_grids(copy_set(tiny_set, tmp_path / "old")), 64) as old, Reader(tiny_set, 64) as reader:
        rows = np.arange(2 * EVERY + 1)
        means, known = Proof(old, CPU).expected(rows), Proof(reader, CPU).expected(rows)
    decoded = rows % EVERY == 0
    assert (means[~decoded] == UNKNOWN).all()
    np.testing.assert_allclose(means[decoded], known[decoded], atol=STEPS / 2)


@pytest.mark.parametrize("side", [4, 30, 64, 101])
def test_means_on_a_device_are_those_of_the_manifests(side: int) -> None:
    images = torch.randint(0, 256, (3, 1, side, side), dtype=torch.uint8)
    expected = np.stack([grid(image).ravel() for image in images[:, 0].numpy()])
    np.testing.assert_allclose(cell_means(images) * STEPS, expected, atol=0.51)
    np.testing.assert_allclose(means_by_torch(images) * STEPS, expected, atol=0.51)
    if torch.cuda.is_available():
        np.testing.assert_allclose(cell_means(images.cuda()).cpu() * STEPS, expected, atol=0.51)


def test_on_a_cpu_nothing_is_proven_unless_asked(reader: Reader) -> None:
    order = EvalOrder(rows=reader.rows, micro_batch=16)
    assert Loader(reader, order, engine="host").proof is None
    assert Loader(reader, order, engine="host", prove=True).proof is None, "the host engine is the oracle"
    if dali.available():
        assert Loader(reader, order, engine="dali").proof is None


@needs_gpu
@needs_dali
@pytest.mark.parametrize("scale", [64, 256, 1024])
def test_a_gpu_proves_by_default_and_its_decoder_passes(real_set: Path, scale: int) -> None:
    with Reader(real_set, scale) as reader:
        order = TrainOrder(rows=reader.rows, global_batch=16, micro_batch=16)
        loader = Loader(reader, order, augment=Augment(), device="cuda")
        with closing(loader):
            assert sum(len(batch.row) for batch in loader) == 224
        assert loader.proof is not None


@needs_dali
def test_a_pipeline_that_runs_out_of_memory_says_so(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "Critical error in pipeline:\nCUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"
    monkeypatch.setattr(DaliEngine, "_decode", Mock(side_effect=RuntimeError(error)))
    says = r"memory ran out while DALI decoded batches of 16 images of 64 px: .*--micro-batch"
    with pytest.raises(LoadError, match=says):
        read_all(load(tiny_set, 64))
