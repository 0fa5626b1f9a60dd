"""Pixels that are wrong, exchanged or read too late are refused."""

import pytest
import torch
from batches import CPU

from cxrfast.doctor import pixels
from cxrfast.doctor.pixels import dali_pixels, host_pixels, proven_pixels, slow_reader
from cxrfast.errors import LoadError
from cxrfast.pipelines import dali, loader
from cxrfast.pipelines.dali import DaliEngine
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.proof import Proof
from cxrfast.pipelines.reader import Reader

needs_dali = pytest.mark.skipif(not dali.available(), reason="DALI is not installed")


@needs_dali
def test_both_engines_pass_on_either_codec(either_set):
    with Reader(either_set, 64) as reader:
        assert "bitwise" in host_pixels(reader, CPU)
        assert "decoded 100.000 %" in dali_pixels(reader, CPU)
        for engine in ("host", "dali"):
            assert "200 batches" in slow_reader(reader, CPU, engine)


class Exchanged(HostEngine):
    """Gives the images of a batch in reverse."""

    def batches(self, work):
        return (batch.flip(0) for batch in super().batches(work))


class OneBuffer(HostEngine):
    """Hands out the same memory for every batch."""

    def batches(self, work):
        buffer = None
        for batch in super().batches(work):
            buffer = batch.clone() if buffer is None or len(buffer) != len(batch) else buffer.copy_(batch)
            yield buffer


class Off(HostEngine):
    """One grey level off at one pixel of each image."""

    def batches(self, work):
        for batch in super().batches(work):
            batch[:, 0, 30, 30] ^= 1
            yield batch


class OffInThreads(HostEngine):
    """One grey level off at one pixel of the last image of a batch where it has several threads."""

    def batches(self, work):
        for batch in super().batches(work):
            if self.threads > 1:
                batch[-1, 0, 30, 30] ^= 1
            yield batch


@pytest.mark.parametrize("engine", [Exchanged, OneBuffer])
def test_a_slow_reader_sees_images_exchanged_and_buffers_used_again(reader, monkeypatch, engine):
    monkeypatch.setattr(loader, "HostEngine", engine)
    with pytest.raises(LoadError, match=r"host: \d+ of 3200 images that were read late differ from the stored ones"):
        slow_reader(reader, CPU, "host")


def test_a_slow_reader_sees_rows_in_another_order(reader, monkeypatch):
    def reverse(self, rows):
        return torch.from_numpy(rows[::-1].copy())

    monkeypatch.setattr(loader.Loader, "_on_device", reverse)
    with pytest.raises(LoadError, match="rows in the wrong order"):
        slow_reader(reader, CPU, "host")


@pytest.mark.parametrize(("engine", "what"), [(Off, "decoded and stored"), (OffInThreads, "on one CPU thread")])
def test_host_pixels_that_are_not_the_stored_ones_or_depend_on_threads_are_refused(reader, monkeypatch, engine, what):
    monkeypatch.setattr(loader, "usable_cores", lambda: 2)
    monkeypatch.setattr(loader, "HostEngine", engine)
    with pytest.raises(LoadError, match=what):
        host_pixels(reader, CPU)


@needs_dali
@pytest.mark.parametrize(("part", "levels"), [(slice(None), 2), (slice(30, 31), 6)])
def test_dali_pixels_that_are_a_little_off_everywhere_or_far_off_anywhere_are_refused(
    reader, monkeypatch, part, levels
):
    class OffDali(DaliEngine):
        def batches(self, work):
            for batch in super().batches(work):
                image = batch.clone()
                middle = image[:, :, part, part]
                middle += torch.where(middle < 128, levels, -levels).to(torch.uint8)
                yield image

    monkeypatch.setattr(loader, "DaliEngine", OffDali)
    with pytest.raises(LoadError, match="use --engine host"):
        dali_pixels(reader, CPU)


@needs_dali
def test_pixels_that_are_not_those_of_the_manifests_are_refused(reader, monkeypatch):
    compare = Proof.compare
    monkeypatch.setattr(Proof, "compare", lambda self, images, *known: compare(self, images.flip(2), *known))
    with pytest.raises(LoadError, match=r"images that were decoded by DALI and compared differ from the set"):
        proven_pixels(reader, CPU)


@needs_dali
def test_an_opencv_that_turns_inexactly_is_not_compared_with(reader, monkeypatch):
    monkeypatch.setattr(pixels, "HOST_TURNS_EXACTLY", False)
    assert "rotated not compared: OpenCV" in dali_pixels(reader, CPU)


@needs_dali
def test_a_dali_that_always_fails_is_not_covered_by_the_host(reader, monkeypatch):
    def fail(self, batch, augmented, feed):
        raise RuntimeError("nvJPEG: CUDA error")

    monkeypatch.setattr(DaliEngine, "_graph", fail)
    monkeypatch.setattr(pixels, "_rows", lambda reader: reader.rows[:3])
    with pytest.raises(LoadError, match="DALI fails on undamaged images"):
        dali_pixels(reader, CPU)
