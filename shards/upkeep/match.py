"""Ids of a table of labels, as text, and those of a set go in; the table's come out as the set writes them.

Images and studies are matched as text, files by the end of their paths. Nothing is guessed: leading zeros count, and what
is ambiguous stays unmatched or is refused.
"""

import pandas as pd

from cxrfast.errors import ShardError

BY = ("image_id", "study_id", "path")
"""Columns of the set by which a table may be matched."""


def match_ids(ids: pd.Series, known: pd.Series, tail: int, what: str) -> pd.Series:
    """The table's `ids` as the column `known` of the set writes them; those that it does not have stay as they are.

    `tail`: of `shared_tail`, for paths; `what`: names table and column in messages. Raises ShardError for ids that are
    listed twice or lack their zeros.
    """
    ids = alike(ids, known, tail, what)
    if repeated := ids[ids.duplicated()].drop_duplicates().tolist():
        more = f" and {len(repeated) - 3:,} more" if len(repeated) > 3 else ""
        raise ShardError(f"{what} lists {', '.join(repeated[:3])}{more} more than once: keep one line for each")
    if known.name != "path":
        _check_zeros(ids[~ids.isin(known)], known[~known.isin(ids)].dropna(), what)
    return ids


def _check_zeros(here: pd.Series, there: pd.Series, what: str) -> None:
    """Raises ShardError if ids of the table alone (`here`) and of the set alone (`there`) differ in leading zeros."""
    bare = there.str.lstrip("0")
    apart = here[here.str.lstrip("0").isin(bare)]
    if len(apart):
        whole = there[bare == apart.iloc[0].lstrip("0")].iloc[0]
        raise ShardError(
            f"{len(apart):,} ids of {what} differ from the set's in leading zeros alone ({apart.iloc[0]} is {whole} "
            "there): write them as text, with their zeros"
        )


def alike(ids: pd.Series, known: pd.Series, tail: int, what: str) -> pd.Series:
    """As the set may write them: 50000014.0 is study 50000014 and 0001.png image 0001, unless it says so itself."""
    if known.name == "path":
        whole = dict(zip(tails(known, tail), known, strict=True)) if tail else {}
        return pd.Series([whole.get(t, i) for t, i in zip(tails(ids, tail), ids, strict=True)], ids.index, dtype=object)
    exact, text = ids.astype(object), ids.str.strip()
    bare = text.str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    if (text.ne(bare) & bare.str.len().gt(15) & ~exact.isin(known)).any():  # more digits than a float64 holds
        raise ShardError(f"{what} holds floating-point numbers too long for ids: write them as text")
    found = exact.where(exact.isin(known), bare.astype(object))
    if known.name == "image_id":
        stem = text.str.replace(r"\.[A-Za-z]\w{0,4}$", "", regex=True).astype(object)
        found = found.where(found.isin(known) | ~stem.isin(known), stem)
    return found


# Paths


def tails(paths: pd.Series, parts: int) -> list[str]:
    """The last `parts` parts of every path; all of one that has fewer."""
    return ["/".join([p for p in path.strip().split("/") if p not in ("", ".")][-parts:]) for path in paths]


def shared_tail(ids: pd.Series, known: pd.Series) -> int:
    """How many parts at their ends the paths of table and set are to be matched by; 0 if they share nothing.

    Where both lie in folders of their own, these are left out, one after the other, as long as the rest still tells all
    paths of either side apart. Of what is left the longest is taken that matches most images.
    """
    sides = [column.drop_duplicates() for column in (ids.str.strip(), known)]
    best, most = 0, 0
    for parts in range(1 + max(int(side.str.count("/").max()) for side in sides), 0, -1):
        here, there = (set(tails(side, parts)) for side in sides)
        if len(here) < len(sides[0]) or len(there) < len(sides[1]):
            break
        if (found := len(here & there)) > most:
            best, most = parts, found
        if most == min(map(len, sides)):
            break
    return best
