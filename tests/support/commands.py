"""Commands: `cxrfast` in this process, and other programs."""

import os
import subprocess
from pathlib import Path

from click.testing import CliRunner, Result

from cxrfast.cli.main import cli


def invoke(*words: object) -> Result:
    """What `cxrfast` with these words prints, and its exit code."""
    return CliRunner().invoke(cli, [str(word) for word in words])


def run(
    *command: object, folder: Path | None = None, timeout: float | None = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What a program prints, and its exit code. `environment`: variables to add to those of this process."""
    words, variables = [str(word) for word in command], {**os.environ, **environment}
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
