"""Wall times and the jobs that a training takes."""

import pytest

from cxrfast.errors import RunError
from cxrfast.study.pace import jobs, parse_walltime


def test_wall_times() -> None:
    assert parse_walltime("24:00:00") == 86400
    assert parse_walltime("1-00:00:10") == 86410
    for text in ("24", "24:00", "1:60:00", "00:02:00", "", "-1:00:00"):
        with pytest.raises(RunError, match="such as 24:00:00"):
            parse_walltime(text)
    assert jobs(3600 * 23, 86400) == 1
    assert jobs(86400, 86400) == 2, "what saving takes is not counted on"
