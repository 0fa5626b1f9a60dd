"""The report of a build says how many images it left out, and warns if their files may be at fault."""

import pytest
from commands import invoke
from sets import table_arguments, write_table


@pytest.mark.parametrize("lost", [0, 2, 8])
def test_many_images_left_out_are_warned_of(lost, tmp_path):
    tree = write_table(tmp_path / "data", [f"p{n}" for n in range(8)], Mass=[0, 1] * 4)
    for n in range(lost):
        (tree / f"i{n:02d}.jpg").write_bytes(b"")
    done = invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass"))
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    assert f"32 px: {8 - lost} rows" in text
    assert f"quarantined: {lost}" in text
    warning = (
        f"warning: {lost} of 8 images ({12.5 * lost:g} %) are left out: if the download is incomplete, finish it and add them "
        "with --retry-quarantined"
    )
    assert (warning in text) == (lost > 0)
