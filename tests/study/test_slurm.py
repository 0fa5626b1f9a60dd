"""Job scripts: what they ask SLURM for, and what they do when they run, with stand-ins for SLURM and torchrun."""

import json
import os
import re
import signal
import subprocess
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from commands import invoke
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict

from cxrfast.errors import RunError
from cxrfast.study.forecast import forecast
from cxrfast.study.plan import make_plan
from cxrfast.study.slurm import MARK, SCRIPTS, Slurm, quoted, read_slurm, write_scripts

OPTIONS = {"weights": "none", "global_batch": 8, "micro_batch": 2}


def scripts(shards: Path, out: Path, slurm: Slurm, nproc: int = 2, **runtime: object) -> dict[str, str]:
    plan = make_plan(shards, out / "runs", [32], [0, 1], nproc=nproc, nodes=slurm.nodes, options=OPTIONS, **runtime)
    written = write_scripts(plan, forecast(plan).outlooks, slurm, out / "jobs")
    for path in written:
        subprocess.run(["bash", "-n", path], check=True)
        assert os.access(path, os.X_OK)
    return {path.name: path.read_text() for path in written}


def test_one_task_per_run_and_a_job_for_the_tables(tiny_set, tmp_path):
    slurm = Slurm(account="abc", partition="gpu", extra=("--qos=long",), setup=("module load cuda",), memory="0")
    texts = scripts(tiny_set, tmp_path, slurm)
    assert list(texts) == ["train.sh", "report.sh", "submit.sh"]
    for option in (
        f"--output={tmp_path}/jobs/train-%A_%a.out",
        *("--array=0-1", "--job-name=cxrfast-train"),
        *("--open-mode=append", "--account=abc", "--partition=gpu", "--time=24:00:00", "--nodes=1", "--mem=0"),
        *("--cpus-per-task=16", "--gpus-per-node=2", "--requeue", "--signal=B:USR1@120", "--qos=long"),
    ):
        assert f"\n#SBATCH {option}\n" in texts["train.sh"]
    assert "\nmodule load cuda\n" in texts["train.sh"]
    assert "torchrun --standalone --nproc_per_node=2 --signals-to-handle=SIGTERM,SIGINT" in texts["train.sh"]
    tasks = [line for line in texts["train.sh"].splitlines() if line.startswith('    "densenet121-32/')]
    assert tasks == [f'    "densenet121-32/fold-{fold} --scale=32 --fold={fold}"' for fold in (0, 1)]
    assert "cxrfast study" in texts["report.sh"]
    assert "#SBATCH --gpus-per-node=1\n" in texts["report.sh"]
    assert "--nproc" not in texts["report.sh"]
    assert "array" not in texts["report.sh"]


def test_several_nodes_meet_at_the_first_and_names_with_spaces_stay_one_word(tiny_set, tmp_path):
    text = scripts(tiny_set, tmp_path / "a b", Slurm(nodes=2))["train.sh"]
    for part in ("#SBATCH --nodes=2\n", "srun ", '--nnodes="$SLURM_NNODES"', "--rdzv_backend=c10d"):
        assert part in text
    assert f'#SBATCH --output="{tmp_path}/a b/jobs/' in text
    assert f'state_file="{tmp_path}/a b/runs"/$name/state.json' in text


def test_one_process_needs_no_torchrun_and_the_cpu_no_gpu(tiny_set, tmp_path):
    text = scripts(tiny_set, tmp_path, Slurm(cpus=3), nproc=1, device="cpu")["train.sh"]
    assert "torchrun --" not in text
    assert "gpus" not in text
    assert "#SBATCH --cpus-per-task=3\n" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[slurm]\nacount = 'x'",
            "unknown field `acount` - at `$.slurm`; give TOML with one table, [slurm], with account",
        ),
        ("[slrum]", "unknown field `slrum`"),
        ("slurm = 3", "Expected `object`, got `int` - at `$.slurm`"),
        ("[slurm]\ngpus = 'six'", "Expected `int | null`, got `str` - at `$.slurm.gpus`"),
        ("[slurm]\nsetup = [1]", "Expected `str`, got `int` - at `$.slurm.setup[0]`"),
        ("[slurm]\nnodes = 0", "Expected `int` >= 1 - at `$.slurm.nodes`"),
        ("[slurm]\ncpus = 0x" + "f" * 5000, "Expected `int` <= 1048576 - at `$.slurm.cpus`"),
        ("[slurm]\ntime = '3 days'", "such as 24:00:00"),
        ("[slurm", "Expected ']' at the end of a table declaration"),
    ],
)
def test_a_wrong_file_is_refused_with_the_name_of_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "slurm.toml"
    path.write_text(text)
    with pytest.raises(RunError, match=re.escape(message)):
        read_slurm(path)


FILE = b"[slurm]\naccount = 'a'\ngpus = 0\nnodes = 2\nextra = ['--qos=x']\ntime = '1-00:00:00'\nsetup = ['module load x']\n"


def test_a_file_is_read(tmp_path):
    path = tmp_path / "slurm.toml"
    with pytest.raises(RunError, match="does not exist"):
        read_slurm(path)
    path.write_bytes(FILE)
    given = {"account": "a", "gpus": 0, "nodes": 2, "extra": ("--qos=x",), "setup": ("module load x",)}
    assert read_slurm(path) == Slurm(**given, time="1-00:00:00")


@given(
    st.integers(0, len(FILE)),
    st.integers(0, 8),
    st.binary(max_size=4) | st.sampled_from([b"-1", b"[1]", b"null", b"'"]),
)
def test_a_mutated_file_is_read_as_it_says_or_refused(tmp_path_factory, at, length, new):
    path = tmp_path_factory.getbasetemp() / "mutated.toml"
    path.write_bytes(FILE[:at] + new + FILE[at + length :])
    try:
        read = asdict(read_slurm(path))
    except RunError:
        return
    says = tomllib.loads(path.read_text()).get("slurm", {})
    expected = asdict(Slurm()) | {name: tuple(v) if isinstance(v, list) else v for name, v in says.items()}
    assert read == expected


TRAINING = """#!/usr/bin/env python3
# Stands in for a training: ends as WANTED says; with "wait", a signal makes it `preempted`.
import json, os, signal, sys, time
def write(state, **more):
    with open(os.environ["STATE"], "w") as file:
        json.dump({"state": state, "time": round(time.time()), **more}, file, indent=2)
def stop(number, frame):
    write("preempted")
    sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
wanted = os.environ["WANTED"]
print(*sys.argv[1:], flush=True)
if wanted == "wait":
    write("running")
    time.sleep(20)
elif wanted == "crash":
    sys.exit(9)
else:
    write(wanted)
    sys.exit(int(wanted == "failed"))
"""


class Job:
    """Task 1 of train.sh as SLURM runs it, with stand-ins for `cxrfast`, `scontrol` and `sbatch` on the path."""

    def __init__(self, shards: Path, folder: Path) -> None:
        scripts(shards, folder, Slurm(), nproc=1, device="cpu")
        self.script = folder / "jobs" / "train.sh"
        self.state = folder / "runs" / "densenet121-32" / "fold-1" / "state.json"
        self.state.parent.mkdir(parents=True)
        tools = folder / "tools"
        tools.mkdir()
        for name, text in (
            ("cxrfast", TRAINING),
            ("scontrol", '#!/bin/sh\necho "scontrol $*"\n'),
            ("sbatch", '#!/bin/sh\necho "$*" >>"$CALLS"\necho "$(wc -l <"$CALLS");cluster"\n'),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.calls = folder / "calls"
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "STATE": str(self.state),
            "CALLS": str(self.calls),
            "SLURM_JOB_ID": "18",
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": "1",
        }

    def run(self, wanted: str, number: int | None = None) -> tuple[int, str]:
        """Exit code and output; `number`: the signal that the batch shell gets while the training runs."""
        process = subprocess.Popen(
            ["bash", self.script],
            env={**self.environment, "WANTED": wanted},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if number is not None:
            while not self.state.exists():
                time.sleep(0.02)
            process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        return process.returncode, output


@pytest.fixture
def job(tiny_set, tmp_path):
    return Job(tiny_set, tmp_path)


@pytest.mark.parametrize(
    ("wanted", "number", "code", "state", "says"),
    [
        ("done", None, 0, "done", "--scale=32 --fold=1 --shards="),
        ("failed", None, 1, "failed", "failed with exit code 1"),
        ("wait", signal.SIGTERM, 143, "preempted", "cancelled; to continue: sbatch --array=1 /"),
        ("wait", signal.SIGUSR1, 0, "preempted", "scontrol requeue 17_1\n"),  # the time is up
        ("preempted", None, 0, "preempted", "scontrol requeue 17_1\n"),  # stopped from elsewhere
    ],
)
def test_a_task_trains_its_own_run_and_is_queued_again_if_it_was_preempted_but_not_cancelled(
    job, wanted, number, code, state, says
):
    found, output = job.run(wanted, number)
    assert (found, json.loads(job.state.read_text())["state"]) == (code, state)
    assert says in output
    assert ("scontrol" in output) == says.startswith("scontrol")


def test_what_an_earlier_start_left_behind_is_not_taken_for_this_ones(job):
    job.state.write_text(json.dumps({"state": "preempted", "time": round(time.time()) - 10}, indent=2))
    code, output = job.run("crash")
    assert code == 9
    assert "scontrol" not in output, "else a task that cannot start would be queued again and again"


def test_submit_queues_the_report_after_the_array(job):
    done = subprocess.run(
        [job.script.parent / "submit.sh"], env=job.environment, capture_output=True, text=True, check=True
    )
    assert job.calls.read_text().splitlines() == [
        f"--parsable {job.script}",
        f"--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes {job.script.with_name('report.sh')}",
    ]
    assert "train.sh: job 1, 2 tasks\nreport.sh: job 2" in done.stdout


def test_only_runs_that_are_not_done_are_queued(tiny_set, tmp_path):
    plan = make_plan(tiny_set, tmp_path / "runs", [32], [0, 1], device="cpu", options=OPTIONS)
    first, second = forecast(plan).outlooks
    write_scripts(plan, [replace(first, what="done"), second], Slurm(), tmp_path)
    text = (tmp_path / "train.sh").read_text()
    assert "--array=0-0\n" in text
    assert "fold-0" not in text
    done = [replace(o, what="done") for o in (first, second)]
    assert [path.name for path in write_scripts(plan, done, Slurm(), tmp_path)] == ["report.sh", "submit.sh"]
    assert not (tmp_path / "train.sh").exists()
    assert "train.sh" not in (tmp_path / "submit.sh").read_text()


def test_the_command_writes_scripts_and_submits_nothing(tiny_set, tmp_path):
    (tmp_path / "slurm.toml").write_text("[slurm]\npartition = 'p'\n")
    arguments = ["study", str(tiny_set), str(tmp_path / "runs"), "--scale", "32", "--fold", "1", "--weights", "none"]
    more = ["--global-batch", "8", "--sbatch", str(tmp_path / "jobs"), "--slurm", str(tmp_path / "slurm.toml")]
    done = invoke(*arguments, *more, "--walltime", "2:00:00")
    assert done.exit_code == 0, done.output
    assert f"queue everything: {tmp_path}/jobs/submit.sh" in done.output
    assert not (tmp_path / "runs").exists()
    text = (tmp_path / "jobs" / "train.sh").read_text()
    assert "#SBATCH --partition=p\n" in text
    assert "#SBATCH --time=2:00:00\n" in text


# Values from outside


HOSTILE = "a b$(touch PWNED)`touch PWNED`\"'\\;touch PWNED #!*?~|&<>${HOME}"
"""What a shell would run, expand or split."""


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" $`\"'\\#!~"), min_size=1))
def test_a_quoted_word_is_the_same_word_to_a_shell(text):
    command = f"printf '%s|' {quoted(text)} \"$(printf '%s' {quoted(text)})\"; x={quoted(text)}; printf '%s' \"$x\""
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert done.stdout.decode() == f"{text}|{text}|{text}"


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b", "a\x1bb", "a\u2028b", "a\u202eb"])
def test_what_would_break_a_line_is_refused(text):
    with pytest.raises(RunError, match=r"cannot stand in a job script: it holds the character U\+"):
        quoted(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'account = "abc\ntouch PWNED"', r"account is 'abc\ntouch PWNED', which holds the character U+000A"),
        (r'partition = "gpu\u0007"', "partition is 'gpu\\x07', which holds the character U+0007"),
        (r'memory = "1G\r"', "memory is '1G\\r', which holds the character U+000D"),
        (r'extra = ["--qos=a", "--comment=x\n#SBATCH --wrap=y"]', "extra[1] is "),
        ('extra = ["--qos long"]', "extra[0] is '--qos long', not one option of sbatch, such as --qos=long"),
        ('extra = ["touch PWNED"]', "extra[0] is 'touch PWNED', not one option of sbatch"),
        (r'setup = ["module load x", "a\u001b[2J"]', r"setup[1] is 'a\x1b[2J', which holds the character U+001B"),
        ("account = 3", "Expected `str`, got `int` - at `$.slurm.account`"),
        ("account = 2020-01-01", "Expected `str`, got `date` - at `$.slurm.account`"),
        ("nodes = [1]", "Expected `int`, got `array` - at `$.slurm.nodes`"),
        ("time.hours = 3", "Expected `str`, got `object` - at `$.slurm.time`"),
        ("gpus = nan", "Expected `int | null`, got `float` - at `$.slurm.gpus`"),
    ],
)
def test_a_value_that_cannot_stand_on_a_line_is_refused_with_its_file_and_key(tmp_path, line, message):
    path = tmp_path / "slurm.toml"
    path.write_text(f"[slurm]\n{line}\n")
    with pytest.raises(RunError, match=re.escape(message)) as refused:
        read_slurm(path)
    assert str(path) in str(refused.value)


def test_a_file_that_cannot_be_read_or_never_ends_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "deep").write_text("[slurm]\nextra = " + "[" * 100_000)
    (tmp_path / "latin").write_bytes(b"[slurm]\naccount = '\xe9'\n")
    for name, message in (("fifo", "is not a regular file"), ("", ""), ("deep", ""), ("latin", "")):
        with pytest.raises(RunError, match=f"--slurm {tmp_path / name}.*{message}"):
            read_slurm(tmp_path / name)
    with pytest.raises(RunError, match="--slurm /dev/zero cannot be read: is not a regular file"):
        read_slurm(Path("/dev/zero"))


def test_values_are_words_in_every_script_and_nothing_in_them_runs(tiny_set, tmp_path, monkeypatch):
    """The scripts run with stand-ins that write down what they were given."""
    work = tmp_path / HOSTILE.replace("\\", "")
    work.mkdir()
    monkeypatch.chdir(work)
    runs = f"-runs{HOSTILE}"
    slurm = Slurm(account=HOSTILE, partition=HOSTILE, memory='1G" --wrap', extra=(f"--comment={HOSTILE}",))
    options = {**OPTIONS, "views": ("PA$(touch PWNED)", HOSTILE)}
    plan = make_plan(tiny_set, Path(runs), [32], [1], device="cpu", options=options)
    outlooks = [replace(o, what="start", refusals=[]) for o in forecast(plan).outlooks]
    for path in write_scripts(plan, outlooks, slurm, Path(f"jobs{HOSTILE}".replace("\\", "").replace("/", ""))):
        subprocess.run(["bash", "-n", path], check=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cxrfast", "sbatch"):
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >>"$CALLS"\necho 1\n')
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "CDPATH": str(tmp_path)}
    said = {}
    jobs = path.parent
    for name in SCRIPTS:
        script = os.path.join(os.path.relpath(jobs), name)
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
        said[name] = done.stdout + done.stderr
    words = calls.read_text().split("\0")
    assert f"--runs={runs}" in words, said
    assert words.count(f"--view={HOSTILE}") == words.count("--view=PA$(touch PWNED)") == 2
    assert words[words.index("--") + 1 :][:2] == [str(tiny_set), runs]
    assert words.count("--parsable") == 2
    assert str(jobs / "report.sh") in words
    assert f"cxrfast status {quoted(runs)}" in said["submit.sh"]
    assert not list(tmp_path.rglob("PWNED*"))


def test_files_of_others_are_neither_replaced_nor_deleted(tiny_set, tmp_path):
    jobs, mine = tmp_path / "jobs", tmp_path / "mine.sh"
    jobs.mkdir()
    mine.write_text(f"#!/bin/sh\n{MARK}\necho mine\n")
    (jobs / "train.sh").symlink_to(mine)
    (jobs / "report.sh").write_text("echo mine\n")
    os.mkfifo(jobs / "submit.sh")
    (jobs / "my-fold-analysis.sh").write_text("echo mine\n")
    plan = make_plan(tiny_set, tmp_path / "runs", [32], [0], device="cpu", options=OPTIONS)
    outlooks = forecast(plan).outlooks
    message = "holds train.sh, report.sh, submit.sh, which this version of cxrfast did not write: give another folder"
    with pytest.raises(RunError, match=message):
        write_scripts(plan, outlooks, Slurm(), jobs)
    assert mine.read_text().endswith("echo mine\n")
    assert sorted(path.name for path in jobs.iterdir()) == [
        "my-fold-analysis.sh",
        "report.sh",
        "submit.sh",
        "train.sh",
    ]
    for name in ("train.sh", "report.sh"):
        (jobs / name).unlink()
    with pytest.raises(RunError, match=r"holds submit\.sh, which"):
        write_scripts(plan, outlooks, Slurm(), jobs)
    assert not (jobs / "train.sh").exists()
    (jobs / "submit.sh").unlink()
    for _ in range(2):  # the second call replaces what the first wrote
        for path in write_scripts(plan, outlooks, Slurm(account="a"), jobs):
            assert path.read_text().splitlines()[1] == MARK
    assert (jobs / "my-fold-analysis.sh").read_text() == "echo mine\n"


def test_a_folder_whose_name_no_line_can_hold_is_refused_and_nothing_is_written(tiny_set, tmp_path):
    plan = make_plan(tiny_set, tmp_path / "runs", [32], [0], device="cpu", options=OPTIONS)
    for name, message in (("a\nb", r"holds the character U\+000A"), ("a\\b", "the backslash")):
        with pytest.raises(RunError, match=message):
            write_scripts(plan, forecast(plan).outlooks, Slurm(), tmp_path / name)
        assert not (tmp_path / name).exists()
    text = write_scripts(plan, forecast(plan).outlooks, Slurm(), tmp_path / "50 %j")[0].read_text()
    assert f'#SBATCH --output="{tmp_path}/50 %%j/train-%A_%a.out"\n' in text


def test_an_automatic_micro_batch_is_said_to_differ_between_gpus(tiny_set, tmp_path, caplog):
    for size, warnings in ((2, 0), ("auto", 1)):
        options = {**OPTIONS, "micro_batch": size}
        plan = make_plan(tiny_set, tmp_path / "runs", [32], [0, 1], device="cpu", options=options)
        write_scripts(plan, forecast(plan).outlooks, Slurm(), tmp_path / f"{size}")
        assert caplog.text.count("may train with different micro-batches; give a number to train all alike") == warnings
