"""What TensorBoard itself reads from the folder of a run."""

import sys
from pathlib import Path

import pytest
from runs import metrics_line

from cxrfast.errors import RunError
from cxrfast.runs.tensorboard import Board


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value), as TensorBoard's own reader has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, pytest.approx(e.value)) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_an_epoch_is_shown_with_all_that_is_defined(tmp_path: Path) -> None:
    board = Board(tmp_path / "tensorboard")
    aurocs = {"val_auroc": 0.75, "val_auroc_by_label": {"Edema": 0.75, "Pleural Effusion": None}}
    for epoch in range(2):
        board.add(metrics_line(epoch, resident_bytes=3 * 2**30, **aurocs), epoch)
    board.close()
    tags = shown(tmp_path)
    assert tags["loss/training"] == [(0, 0.5), (1, 0.4)]
    assert tags["loss/validation"] == [(0, 0.6), (1, 0.5)]
    assert tags["AUROC/mean"] == tags["AUROC/Edema"] == [(0, 0.75), (1, 0.75)]
    assert tags["memory/process, GiB"] == [(0, 3.0), (1, 3.0)]
    assert tags["training/learning rate"][1] == (1, 1e-4)
    assert {"training/images per second", "training/share of time waiting for data"} <= tags.keys()
    assert not {"AUROC/Pleural Effusion", "memory/torch on the GPU, GiB"} & tags.keys(), "undefined is not drawn"


@pytest.mark.parametrize("resumed", [0, 1])
def test_a_run_that_resumes_earlier_or_starts_again_hides_its_old_epochs(tmp_path: Path, resumed: int) -> None:
    for epochs, loss in ((range(3), 0.5), (range(resumed, 2), 0.3)):
        board = Board(tmp_path / "tensorboard", epochs[0])
        for epoch in epochs:
            board.add(metrics_line(epoch, train_loss=loss), epoch)
        board.close()
    assert shown(tmp_path)["loss/training"] == [(0, 0.5 if resumed else 0.3), (1, 0.3)]


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(RunError, match=r"pip install 'cxrfast\[tensorboard\]'"):
        Board(tmp_path / "tensorboard")
    assert not (tmp_path / "tensorboard").exists()
