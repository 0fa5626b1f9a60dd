"""Signs and footnotes of groups of runs."""

import pandas as pd

from cxrfast.analysis.marks import footnotes, group_remark, marked

BOTH = "unfinished, running after 1 of 2 epochs; its set has other labels now, 1 label of 1 row"
LINES = pd.DataFrame(
    [
        ("a-32", 0, "ImageNet", ""),
        ("a-32", 1, "ImageNet", ""),
        ("a-64", 0, "from a-32/fold-0", BOTH),
        ("a-64", 1, "from a-32/fold-1", "its set has other labels now, 1 label of 1 row"),
    ],
    columns=["name", "fold", "start", "remark"],
)


def test_a_name_has_the_sign_of_its_origin_and_of_its_remarks() -> None:
    assert marked({"a-32": "32 px", "a-64": "64 px"}, LINES) == {"a-32": "32 px", "a-64": "64 px†‡"}


def test_each_remark_is_explained_once_with_its_runs() -> None:
    assert footnotes(LINES).splitlines() == [
        "† weights started from the run of a smaller scale: a-64 from a-32.",
        "‡ unfinished, running after 1 of 2 epochs: a-64 (fold 0); its set has other labels now, 1 label of 1 row: a-64 "
        "(folds 0, 1).",
    ]
    assert footnotes(LINES[:2]) == ""


def test_remarks_of_a_group_say_which_folds_they_are_about() -> None:
    assert group_remark(LINES) == {
        "a-32": "",
        "a-64": "unfinished, running after 1 of 2 epochs (fold 0); its set has other labels now, 1 label of 1 row (folds 0, 1)",
    }
