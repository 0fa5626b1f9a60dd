"""Variables of torchrun and of SLURM: what they say, and what they cannot say."""

import pytest
from commands import invoke

from cxrfast.errors import RunError
from cxrfast.launch import Launch, launched, refuse_slurm_tasks

PAIR = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_process_is_alone_unless_torchrun_says_otherwise() -> None:
    assert launched({}) == launched({"WORLD_SIZE": "", "RANK": ""}) == launched({"WORLD_SIZE": "1"}) == Launch()
    assert launched({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3"}) == Launch()
    assert launched({**PAIR, **MEETING}) == Launch(rank=1, size=2, local_rank=1, local_size=2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is set, but RANK and MASTER_ADDR and MASTER_PORT are not: start the processes",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "but MASTER_ADDR are not"),
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE is not: .*unset it to use one process"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK='x' is not a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' is not a number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is not a number"),
        ({"WORLD_SIZE": "²"}, "is not a number"),
        ({"WORLD_SIZE": "9" * 5000}, "is not a number"),
        ({"WORLD_SIZE": "0"}, "cannot be"),
        ({**MEETING, **PAIR, "RANK": "2"}, "RANK=2 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 cannot be"),
        ({**MEETING, **PAIR, "LOCAL_RANK": "2"}, "cannot be"),
        ({**MEETING, **PAIR, "LOCAL_WORLD_SIZE": "4"}, "cannot be"),
        ({**MEETING, **PAIR, "MASTER_PORT": "port"}, "MASTER_PORT='port' is not a number"),
    ],
)
def test_variables_that_contradict_each_other_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        launched(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "2"}, r"2 tasks \(SLURM_NTASKS=2\)"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        (
            {"SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
            "`torchrun 4`, or `srun --ntasks=1 cxrfast train …` for one process",
        ),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "3"}, "`torchrun 3`"),
    ],
)
def test_several_tasks_of_slurm_are_refused_with_what_to_start_instead(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        refuse_slurm_tasks("cxrfast train", "torchrun {n}", environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "2", "WORLD_SIZE": "2"},  # a rank of torchrun under srun
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in a job of four
        {"SLURM_NTASKS": "four"},
    ],
)
def test_one_task_of_slurm_and_the_ranks_of_torchrun_go_on(environment: dict[str, str]) -> None:
    refuse_slurm_tasks("cxrfast train", "torchrun {n}", environment)  # raises nothing
    tasks = {name: "3" for name in environment if name != "WORLD_SIZE"} or {"SLURM_NTASKS": "3"}
    with pytest.raises(RunError, match="3 tasks"):
        refuse_slurm_tasks("cxrfast train", "torchrun {n}", tasks)


def test_commands_that_would_do_everything_twice_say_so_before_anything_is_read(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("SLURM_NTASKS", "2")
    train = ("train", "--shards", tmp_path / "absent", "--scale=32")
    study = ("study", tmp_path / "absent", tmp_path / "runs")
    for command, line in (
        (train, "`torchrun --nproc_per_node=2 -m cxrfast.train …`"),
        (("predict", tmp_path / "absent"), "`torchrun --nproc_per_node=2 -m cxrfast predict …`"),
        (study, "`srun --ntasks=1 cxrfast study … --nproc=2`"),
    ):
        done = invoke(*command)
        assert (done.exit_code, line in done.output) == (2, True), done.output
    done = invoke(*study, "--nproc=2")  # in a job script with a task per process, which torchrun starts
    assert "SLURM" not in done.output
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "SLURM gives this command 2 tasks" in invoke(*study, "--nproc=2").output
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = invoke(*train)
    assert (done.exit_code, "MASTER_ADDR" in done.output) == (2, True), done.output
