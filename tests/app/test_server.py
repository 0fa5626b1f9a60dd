"""`cxrfast app` as a command: what it refuses, and how it starts and ends."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from apps import heed_ctrl_c, served
from commands import invoke, run


def test_a_port_in_use_is_one_message(runs):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = invoke("app", runs, "--port", port)
    message = f"cxrfast: port {port} is in use: stop the other program, or use --port 0 for a free one\n"
    assert (done.exit_code, done.stderr) == (2, message)


@pytest.mark.parametrize("module", ["starlette", "uvicorn"])
def test_a_missing_library_is_one_message(runs, module):
    code = f"import sys; sys.modules[{module!r}] = None; from cxrfast.cli.main import cli; cli()"
    done = run(sys.executable, "-c", code, "app", runs)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cxrfast: cxrfast app needs Starlette and uvicorn: pip install 'cxrfast[app]'\n"


def test_a_folder_that_holds_no_model_is_one_message(tmp_path):
    done = invoke("app", tmp_path, "--port", 0)
    assert done.exit_code == 2
    assert f"no runs in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_listens_on_this_machine_alone(app):
    listening = [c.laddr for c in psutil.Process(app.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert [address.ip for address in listening] == ["127.0.0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_at_once_and_takes_its_model_along(runs, tmp_path, sent):
    process = None
    try:
        with served(runs, folder=tmp_path) as app:
            process = app.process
            (worker,) = psutil.Process(process.pid).children()
            os.kill(process.pid, sent)
            process.wait(10)
            raise InterruptedError
    except (InterruptedError, AssertionError):
        pass
    assert process is not None
    assert process.returncode == (0 if sent == signal.SIGINT else -sent)
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_while_it_loads_ends_it(runs, tmp_path):
    command = [sys.executable, "-m", "cxrfast", "app", str(runs), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=tmp_path, preexec_fn=heed_ctrl_c) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("loading the model")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")
