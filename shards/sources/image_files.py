"""Where a tree keeps the images that its tables name, and what to tell a user whose images are elsewhere."""

import posixpath
import re
import unicodedata
from functools import cached_property

import pandas as pd

from cxrfast.shards.storage import Tree

SUFFIX = r"\.[A-Za-z][^./]*$"
"""Suffix of a file name, which is not part of an image's id. It starts with a letter: a DICOM UID may be the whole name, and
the number at its end is part of it."""

LOOKED_FOR = 50
"""Missing images that `where_instead` looks for."""

FOLDERS = 50
"""Folders of a level in which it looks, at most."""


def as_in_tree(tree: Tree, paths: pd.Series) -> pd.Series:
    """Write paths as the tree does: with slashes where the table has backslashes, and in the file's Unicode form.

    A path that exists as it is written stays; so does one that exists in no form.
    """
    doubtful = paths[~paths.map(str.isascii) | paths.str.contains("\\", regex=False)]
    forms = {path: list(dict.fromkeys(_forms(path))) for path in doubtful.unique()}
    tried = [form for path_forms in forms.values() for form in path_forms]
    exists = dict(zip(tried, tree.sizes(tried) >= 0, strict=True)) if tried else {}
    found = {path: next((form for form in forms[path] if exists[form]), path) for path in forms}
    return paths.map(lambda path: found.get(path, path)).astype(object)


def _forms(path: str) -> list[str]:
    slashes = path.replace("\\", "/")
    return [path, slashes, *(unicodedata.normalize(form, p) for p in (path, slashes) for form in ("NFC", "NFD"))]


def where_instead(tree: Tree, missing: list[str]) -> str:
    """Where the tree seems to have images that are missing under these paths, and what to do; "" if it has none like them."""
    some = missing[:: max(1, len(missing) // LOOKED_FOR)][:LOOKED_FOR]
    here = _Files(tree)
    kinds: dict[str, list[str]] = {}
    for path in some:
        for kind, found in (("name", here.of_like_name(path)), ("folder", here.in_other_folder(path))):
            if found:
                kinds.setdefault(kind if kind == "folder" else _difference(path, found), []).append(found)
                break
    if not kinds:
        return ""
    kind, files = max(kinds.items(), key=lambda item: len(item[1]))
    like = f"{len(files)} of {len(some)} images looked for are there"
    if kind == "folder":
        path = next(path for path in some if here.in_other_folder(path) == files[0])
        inside = files[0].removesuffix("/" + path)
        if inside != files[0]:
            return f"{like}, in {inside} (such as {files[0]}): give --data {posixpath.join(str(tree), inside)}"
        return (
            f"{like}, in other folders (such as {files[0]}): give a table with the paths as they are (--source table)"
        )
    return f"{like}, {kind} (such as {files[0]}): rename them, or give a table with the names that they have (--source table)"


def _difference(path: str, found: str) -> str:
    """How the name of a file differs from the path that the table gives."""
    stem, other = (re.sub(SUFFIX, "", name) for name in (path, found))
    suffix, ending = path.removeprefix(stem), found.removeprefix(other)
    if stem == other:
        return f"with the suffix {ending} instead of {suffix}" if ending else f"without the suffix {suffix}"
    if path.lower() == found.lower():
        return "with other capital letters"
    return (
        "with other capital letters and another suffix" if stem.lower() == other.lower() else "in another Unicode form"
    )


class _Files:
    """Files of a tree, by folder; each folder is listed once."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._like: dict[str, dict[str, str]] = {}

    def of_like_name(self, path: str) -> str | None:
        """The file in the folder of `path` whose name differs only in suffix, case or Unicode form."""
        folder, name = posixpath.split(path)
        if folder not in self._like:
            self._like[folder] = {}
            for other in self.tree.files(folder):
                for likeness in (_plain(re.sub(SUFFIX, "", other)), _plain(other)):
                    self._like[folder].setdefault(likeness, posixpath.join(folder, other))
        like = self._like[folder]
        return like.get(_plain(name)) or like.get(_plain(re.sub(SUFFIX, "", name)))

    def in_other_folder(self, path: str) -> str | None:
        """The file of this name in the tree's upper folders."""
        return self._elsewhere.get(posixpath.basename(path))

    @cached_property
    def _elsewhere(self) -> dict[str, str]:
        """{name: path} of the files in the tree itself and in folders up to two levels below."""
        folders = ["", *self.tree.folders("")[:FOLDERS]]
        folders += [f"{top}/{name}" for top in folders[1:] for name in self.tree.folders(top)[:FOLDERS]][:FOLDERS]
        found: dict[str, str] = {}
        for folder in reversed(folders):
            found |= {name: posixpath.join(folder, name) for name in self.tree.files(folder)}
        return found


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
