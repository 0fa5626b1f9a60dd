import json
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from commands import invoke

from cxrfast.bench import harness
from cxrfast.bench.harness import Budget
from cxrfast.bench.training.ladder import bench, bound
from cxrfast.bench.training.ladder_measure import RUNGS, alone, kind, largest, make_step, pick_rungs, rates, rungs_of
from cxrfast.errors import RunError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
def test_every_rung_is_measured_and_compared_with_the_first(tmp_path, caplog):
    caplog.set_level("INFO", "cxrfast")
    only = ["channels-last", "recompute"]  # each takes a process
    result = bench([32], tmp_path, seconds=0.1, micro_batch=4, device="cpu", with_profile=True, only=only)
    assert [line["rung"] for line in result.lines] == ["torchvision", *only]
    assert result.left_out == {}
    said = "\n".join(caplog.messages)
    assert said.startswith("bench ladder: training steps of densenet121 on a synthetic batch (cpu)\n  scales: 32 px")
    assert "rungs: torchvision, channels-last, recompute; ratios refer to torchvision, which is always measured" in said
    assert "left out: autocast, ours, compile, autotune (" in said
    assert "32 px: 21/21 figures" in said
    for line in result.lines:
        assert line["failed"] is None
        assert min(line["rounds"] or [0]) > 0
        assert 2**27 < (line["peak_bytes"] or 0) < 2**34
        kinds = line["kinds"] or {"none": 0}
        assert max(kinds, key=lambda name: kinds[name]) in ("convolution", "other")
        assert min(kinds.values()) > 0
        assert (line["largest"], line["bound"], line["gpu_used_bytes"]) == (None, None, None), "of GPUs"
    _, theirs, checkpointed = (line["saved_bytes"] or 0 for line in result.lines)
    assert 0 < checkpointed < 0.6 * theirs
    assert result.lines[0]["ratio"] == 1
    assert json.loads((tmp_path / "ladder.json").read_text())["provenance"]["torch"]


def test_the_first_rung_is_float32_and_tf32_is_a_rung_of_gpus():
    assert list(rungs_of(GPU))[:3] == ["torchvision", "tf32", "autocast"]
    assert [rung.name for rung in RUNGS if rung.name not in rungs_of(CPU)] == ["tf32"]
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    try:
        step = make_step(RUNGS[0], 32, 2, CPU)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # as another rung may leave it
        step()
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


def test_a_rung_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    for name in ("tf32", "fast"):
        options = ["--device", "cpu", "--only", name, "--out", str(tmp_path / "out")]
        done = invoke("bench", "ladder", *options)
        assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
        assert (
            f"rung {name!r} does not exist on a cpu device: use one of torchvision, autocast, channels-last, ours"
            in done.stderr
        )
    assert [rung.name for rung in pick_rungs(["tf32", "autotune"], GPU)] == ["tf32", "autotune"]


def test_after_the_time_is_over_only_the_first_rung_starts():
    found = rates(32, 2, "cpu", ["torchvision", "autocast"], 0.01, Budget(0.0))
    assert len(found["torchvision"]["rounds"]) == 1
    assert found["autocast"] == {"failed": "no time left: give more --minutes, or measure less"}


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch):
    """The time is over after the rates at the first scale."""

    def run(work: Callable, options: dict, **more: object) -> dict:
        time.sleep(1)
        return {"torchvision": {"rounds": [2.0]}}

    monkeypatch.setattr(harness, "in_own_process", run)
    result = bench([32, 64], tmp_path, device="cpu", only=["torchvision"], minutes=0.015)
    assert [(line["scale"], line["rounds"], line["peak_bytes"]) for line in result.lines] == [(32, [2.0], None)]
    assert list(result.left_out) == ["64 px", "memory at 32 px"]
    assert list(json.loads((tmp_path / "ladder.json").read_text())["left_out"]) == ["64 px", "memory at 32 px"]
    text = (tmp_path / "ladder.md").read_text()
    assert "Left out: 64 px (" in text
    assert "Left out: memory at 32 px (torchvision: " in text


def test_a_rung_that_takes_its_process_down_costs_its_own_line_only(tmp_path, monkeypatch):
    def run(work: Callable, options: dict, **more: object) -> dict:
        if work is alone:
            return {"peak_bytes": 1, "saved_bytes": 1, "kinds": None, "largest": 8}
        if "autocast" in options["rungs"]:
            raise RunError("exit code -11")
        return {rung: {"rounds": [2.0] if rung == RUNGS[0].name else [6.0]} for rung in options["rungs"]}

    monkeypatch.setattr(harness, "in_own_process", run)
    lines = bench([64], tmp_path, device="cpu").lines
    assert [line["failed"] for line in lines] == [None, "exit code -11", None, None, None]
    assert [line["ratio"] for line in lines] == [1, None, 3, 3, 3]
    assert "exit code -11" in (tmp_path / "ladder.md").read_text()


def test_nothing_measured_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "in_own_process", Mock(side_effect=MemoryError("out of memory")))
    with pytest.raises(RunError, match="no rung could be measured; first: out of memory"):
        bench([64], tmp_path, device="cpu")


@pytest.mark.parametrize(("start", "room", "found"), [(4, 37, 32), (64, 37, 32), (4, 0, None), (3, 3, 3)])
def test_the_largest_micro_batch_is_sought_up_or_down(start, room, found):
    def make(images: int) -> Callable[[], int]:
        if images > room:
            raise torch.OutOfMemoryError
        return lambda: images

    assert largest(make, start) == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_batch_norm_backward", "batch norm"),
        ("aten::threshold_backward", "elementwise"),
        ("aten::cat", "copy"),
        ("aten::max_pool2d_with_indices", "other"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NHWC<__nv_bfloat16, float, int, 512, true, 1, true>", "batch norm"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var>", "batch norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::threshold_kernel_impl>", "elementwise"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copy"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<OpaqueType<2u>, unsigned>", "copy"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>", "copy"),
        ("triton_red_fused__native_batch_norm_legit_functional_cat_5", "batch norm"),
        ("triton_poi_fused__to_copy_cat_3", "elementwise"),
        ("triton_tem_fused_convolution_7", "convolution"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, expected):
    assert kind(name) == expected


def test_the_bound_is_of_an_h200_alone_and_shown_where_it_is_known():
    line = {"scale": 1024, "rung": RUNGS[2].name, "rounds": [178.5]}
    assert bound(line, "NVIDIA H200") == pytest.approx(0.5, abs=1e-2)
    assert bound(line, "NVIDIA A100-SXM4-40GB") is None
    assert bound(line, None) is None
