"""Names of findings in names of files."""

import pytest

from cxrfast.runs.folder import RunFolder, file_name


@pytest.mark.parametrize(
    "label", ["a/b", "..", ".", "../../x", "/etc/passwd", "C:\\x", "x" * 200, "肺" * 200, "\0", "a\nb"]
)
def test_a_finding_is_always_one_name_in_the_folder_of_its_run(tmp_path, label):
    path = RunFolder(tmp_path).gradcam_path(label)
    assert path.parent == tmp_path
    assert len(path.name) < 150
    path.touch()
    assert list(RunFolder(tmp_path).gradcam_paths().values()) == [path]


def test_names_keep_apart_what_findings_keep_apart():
    labels = [".", "..", "%2E", "a/b", "a%2Fb", "a b", "x" * 200, "x" * 199, "x" * 199 + "y", "Pleural Effusion"]
    assert len({file_name(label).casefold() for label in labels}) == len(labels)
    assert file_name("Pleural Effusion") == "Pleural Effusion"
