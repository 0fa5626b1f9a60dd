"""Text from outside: which names may enter a set, what a terminal may show, and URLs without their credentials."""

import re
import unicodedata
from collections.abc import Callable, Iterable

LONGEST_NAME = 200
"""Characters of a label or an id."""

LONGEST_PATH = 4096
"""Bytes of a path that Linux accepts."""

FORMULA = re.compile(r"=|[+@-].*[(|!]", re.DOTALL)
"""Start of a text that a spreadsheet takes for a formula: `=…`, or `-…` with a call in it, such as `-2+cmd|'/C calc'!A0`."""

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the order in which others are shown."""

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
"""Zero-width characters, the byte order mark and the soft hyphen."""

INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control and format characters, surrogates, and separators of lines and paragraphs."""


def trimmed(text: str) -> str:
    """Text without the blanks and zero-width characters at its ends."""
    while text != (bare := text.strip().strip(ZERO_WIDTH)):
        text = bare
    return text


# Names


PLAIN = re.compile(rf"(?![=+@ -])[^\n]{{1,{LONGEST_NAME}}}(?<! )").fullmatch
"""Matches printable text without any fault."""


def name_fault(name: str) -> str | None:
    """What is wrong with a label or an id, for a message; None if it is at most 200 printable characters and no formula.

    The ordinary space is the only blank allowed: others look like it, and would make two names of one.
    """
    if len(name) > LONGEST_NAME:
        return f"has {len(name):,} characters, and at most {LONGEST_NAME} are allowed"
    if not name.isprintable():
        return _holds(next(c for c in name if not c.isprintable()))
    if FORMULA.match(name):
        return "would be run as a formula by a spreadsheet"
    return None


def label_fault(name: str) -> str | None:
    """As `name_fault`; a label must not start or end with blanks either, which nobody sees."""
    return name_fault(name) or ("starts or ends with a blank" if name != name.strip() else None)


def path_fault(path: str) -> str | None:
    """What is wrong with the path of a file, for a message. It may hold what file systems accept, but no character that
    would break a line or change the order of others."""
    if (length := len(path.encode(errors="replace"))) > LONGEST_PATH:
        return f"has {length:,} bytes, and at most {LONGEST_PATH:,} are allowed"
    if path.isprintable():
        return None
    wrong = (c for c in path if c in BIDI or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"))
    return _holds(found) if (found := next(wrong, None)) else None


def are_plain(names: list[str]) -> bool:
    """Whether no name or path can have a fault; much faster than to look at each, and true for nearly all tables."""
    short = max(map(len, names), default=0) <= LONGEST_NAME
    return short and "".join(names).isprintable() and {name[:1] for name in names}.isdisjoint("=+@-")


def find_fault(names: Iterable[str], fault: Callable[[str], str | None]) -> str | None:
    """The first name that has a fault, and which, as `'a\\tb' holds the character U+0009`; None if there is none."""
    names = list(names)
    if "".join(names).isprintable() and all(map(PLAIN, names)):  # a quick look: sets have millions of names
        return None
    return next((f"{shown(name)} {what}" for name in names if (what := fault(name))), None)


def shown(text: str, length: int = 60) -> str:
    """Text in quotation marks, escaped and cut, for a message."""
    return repr(text) if len(text) <= length else f"{text[:length]!r}…"


def _holds(character: str) -> str:
    name = unicodedata.name(character, "")
    return f"holds the character U+{ord(character):04X}{f' ({name.lower()})' if name else ''}"


# Messages


def printable(text: str) -> str:
    """Text for a terminal: control characters other than line breaks and tabs, and invisible ones, are escaped."""
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if c not in "\n\t" and unicodedata.category(c) in INVISIBLE else c for c in text)


# Credentials

USER = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)(?![^\s/:@]*:\d+/)[^\s/:@]*:(?!:)(?:(?!://)[^\s@])+@")
"""`user:password@` after the scheme of a URL. Passwords may hold slashes, as those of S3 do; a port is not a password."""

SECRET = (
    r"[\w.-]*(?:sig|signature|token|secret|passw(?:or)?d|pwd|passphrase|credentials?|auth|authorization|session|jwt"
    r"|(?:api|access|account|shared|private|subscription)[_-]?key(?:[_-]?id)?)|key|sas|pass|x-(?:amz|goog)-[\w-]+"
)
"""Names of parameters in a URL that grant access."""

QUERY = re.compile(rf"([?&;])((?:{SECRET})=)[^\s&;#'\"]*", re.IGNORECASE)


def masked(text: str) -> str:
    """Text in which the credentials of URLs are `***`."""
    return QUERY.sub(r"\1\2***", USER.sub(r"\1***@", text))


def without_credentials(url: str) -> str:
    """A URL without user, password and parameters that grant access."""
    cut = QUERY.sub(r"\1", USER.sub(r"\1", url))
    return re.sub(r"([?&;])[&;]*(?=$|#|::)", "", re.sub(r"([?&;])[&;]+", r"\1", cut))
