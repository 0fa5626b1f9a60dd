"""Where a tree keeps the images that its tables name, and what to tell a user whose images are elsewhere."""

import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.tables.text_columns import lines
from cxrfast.shards.storage import Tree

SUFFIX = r"\.[A-Za-z][^./]*$"
"""Suffix of a file name, which is not part of an image's id. It starts with a letter: a DICOM UID may be the whole name, and
the number at its end is part of it."""

IMAGES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom", "")
"""Suffixes of files that are usually images, in lower case; DICOM files often have none."""

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


def by_name(tree: Tree, paths: pd.Series, table: str) -> pd.Series:
    """Paths in the tree of the files with the names that `paths` end with, wherever the tree has them.

    A name is compared as it is, else without suffix, else without regard to capital letters. One that no file has stays as
    it is written. Raises ShardError for a name that several files have, and for a file that two lines name.
    """
    files = list(_walk(tree))
    found = pd.Series(list(_named(files, paths, table)), paths.index, dtype=object)
    if (twice := found.duplicated(keep=False)).any():
        first = found[twice].iloc[0]
        at = paths.index[found == first]
        raise ShardError(f"{table} names {first} in {lines(at)}: keep one line per image")
    return found


def _named(files: list[str], paths: pd.Series, table: str) -> Iterator[str]:
    """Path of the file that each line means."""
    keys = (_nfc, lambda name: _nfc(_stem(name)), lambda name: _plain(_stem(name)))
    likes: list[dict[str, list[str]]] = [{} for _ in keys]
    for file in files:
        name = posixpath.basename(file)
        likes[0].setdefault(_nfc(name), []).append(file)
        if is_image(name):  # notes may have the name of an image
            for key, like in list(zip(keys, likes, strict=True))[1:]:
                like.setdefault(key(name), []).append(file)
    for line, path in paths.items():
        name = posixpath.basename(path.strip().replace("\\", "/"))
        same = next(
            (files for key, like in zip(keys, likes, strict=True) if (files := like.get(key(name), []))), [path]
        )
        if len(same) > 1:
            raise ShardError(
                f"line {line} of {table} names {path}, and {len(same):,} files are called so: {same[0]}, {same[1]}: give paths "
                "instead of names, without --find-by-name"
            )
        yield same[0]


def is_image(name: str) -> bool:
    """Whether a file looks like an image by its name. Names that start with a dot are those of other programs."""
    return name.removeprefix(_stem(name)).lower() in IMAGES and not name.startswith(".")


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return re.sub(SUFFIX, "", name)


def _walk(tree: Tree) -> Iterator[str]:
    """Paths of all files of the tree; a folder that links lead to again is listed once."""
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        place = os.path.realpath(tree.roots[0] + folder) if tree.is_local else folder
        if place not in seen:
            seen.add(place)
            yield from (posixpath.join(folder, name) for name in tree.files(folder))
            folders += [posixpath.join(folder, name) for name in tree.folders(folder)]


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
        if inside != files[0] and all(file.startswith(inside + "/") for file in files):
            return f"{like}, in {inside} (such as {files[0]}): give --data {posixpath.join(str(tree), inside)}"
        return (
            f"{like}, in other folders (such as {files[0]}): give a table with the paths as they are (--source table), or look "
            "for files by their names alone with --find-by-name"
        )
    return (
        f"{like}, {kind} (such as {files[0]}): rename them, or give a table with the names that they have (--source table), "
        "or look for files by their names alone with --find-by-name"
    )


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
