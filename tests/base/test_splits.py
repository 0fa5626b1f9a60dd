import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import RunError
from cxrfast.splits import (
    BLOCKS,
    FOLDS,
    LARGE,
    PARTS,
    SHOWN,
    check_official,
    check_parts,
    deal,
    official_masks,
    part_masks,
    shared_patients,
)

PATIENTS = st.lists(st.integers(10_000_000, 10_000_300).map(str), min_size=1, max_size=150)
SEEDS = st.integers(0, 2**63 - 1)


def numbered(n: int, first: int = 10_000_000) -> list[str]:
    return [str(first + i) for i in range(n)]


@settings(max_examples=20)
@given(PATIENTS, SEEDS, st.randoms(use_true_random=False))
def test_a_patient_gets_one_fold_and_block_whatever_the_order_and_number_of_its_images(patients, seed, random):
    dealt = dict(zip(patients, zip(*deal(patients, seed), strict=True), strict=True))
    shuffled = patients * 2
    random.shuffle(shuffled)
    fold, block = deal(shuffled, seed)
    assert [dealt[p] for p in shuffled] == list(zip(fold, block, strict=True))


@settings(max_examples=20)
@given(PATIENTS, SEEDS)
def test_folds_of_a_small_set_and_blocks_within_a_fold_differ_by_one_patient_at_most(patients, seed):
    unique = sorted(set(patients))
    fold, block = deal(unique, seed)
    sizes = np.bincount(fold, minlength=FOLDS)
    assert len(sizes) == FOLDS
    assert np.ptp(sizes) <= 1
    for k in range(FOLDS):
        sizes = np.bincount(block[fold == k], minlength=BLOCKS)
        assert len(sizes) == BLOCKS
        assert np.ptp(sizes) <= 1


@settings(max_examples=20)
@given(st.lists(st.integers(0, 300).map(str), min_size=10, max_size=200, unique=True), SEEDS, st.data())
def test_parts_are_disjoint_by_patient_cover_every_row_and_let_every_patient_train(patients, seed, data):
    images = np.array(patients + data.draw(st.lists(st.sampled_from(patients), max_size=200)))
    fold, block = deal(images.tolist(), seed)
    tested = np.zeros(len(images), int)
    trained: set[str] = set()
    for k in range(FOLDS):
        masks = part_masks(fold, block, k)
        check_parts(masks, f"fold {k}")
        assert list(masks) == list(PARTS)
        assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
        train, val, test = (set(images[masks[part]]) for part in PARTS)
        assert not train & val
        assert not train & test
        assert not val & test
        tested += masks["test"]
        trained |= train
    assert (tested == 1).all()
    assert trained == set(patients)


def test_from_ten_patients_on_no_part_of_any_fold_is_empty():
    for n in range(10, 160):
        fold, block = deal(numbered(n), n)
        for k in range(FOLDS):
            check_parts(part_masks(fold, block, k), f"{n} patients, fold {k}")


def test_validation_holds_about_a_tenth_and_test_a_fifth_of_a_large_set():
    fold, block = deal(numbered(20_000), 0)
    for k in range(FOLDS):
        masks = part_masks(fold, block, k)
        assert masks["test"].mean() == pytest.approx(0.20, abs=0.02)
        assert masks["val"].mean() == pytest.approx(0.08, abs=0.01)


def test_patients_added_to_or_missing_from_a_large_set_move_nobody():
    patients = numbered(LARGE + 500)
    fold, block = deal(patients, 3)
    more_fold, more_block = deal(numbered(700, first=9_000_000) + patients, 3)
    assert (more_fold[700:] == fold).all()
    assert (more_block[700:] == block).all()
    fewer_fold, fewer_block = deal(patients[499:], 3)
    assert (fewer_fold == fold[499:]).all()
    assert (fewer_block == block[499:]).all()


def test_a_large_set_is_dealt_by_the_published_hash():
    patients = numbered(LARGE + 1)
    fold, block = deal(patients, 11)
    for i in range(0, LARGE, 97):
        cell = int.from_bytes(hashlib.blake2b(f"11/{patients[i]}".encode(), digest_size=8).digest(), "big") % 50
        assert (fold[i], block[i]) == divmod(cell, 10)


def test_another_seed_deals_otherwise():
    for n in (100, LARGE + 100):
        fold, block = deal(numbered(n), 0)
        other_fold, other_block = deal(numbered(n), 1)
        assert (fold != other_fold).mean() > 0.6
        assert (block != other_block).mean() > 0.6


def test_a_fold_that_does_not_exist_and_an_empty_part_are_errors_that_name_them():
    for k in (-1, 5):
        with pytest.raises(RunError, match=f"fold {k} does not exist: folds are 0 to 4"):
            part_masks(np.zeros(3, np.int8), np.zeros(3, np.int8), k)
    for part in PARTS:
        masks = {name: np.array([name != part, False]) for name in PARTS}
        with pytest.raises(RunError, match=rf"fold 2: the {part} part has no rows"):
            check_parts(masks, "fold 2")


def test_the_official_split_is_taken_as_it_is_and_rows_without_one_are_in_no_part():
    masks = official_masks(np.array(["train", "validate", "test", None, "train"], object))
    assert {part: mask.tolist() for part, mask in masks.items()} == {
        "train": [True, False, False, False, True],
        "val": [False, True, False, False, False],
        "test": [False, False, True, False, False],
    }


@pytest.mark.parametrize("k", range(5))
def test_a_fold_tests_its_own_patients_and_validates_on_block_2k_of_the_others(k):
    fold, block = np.divmod(np.arange(50), 10)
    parts = part_masks(fold, block, k)
    assert np.flatnonzero(parts["test"]).tolist() == list(range(10 * k, 10 * k + 10))
    assert np.flatnonzero(parts["val"]).tolist() == [10 * other + 2 * k for other in range(5) if other != k]
    assert (np.stack(list(parts.values())).sum(axis=0) == 1).all()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), min_size=1, max_size=200), SEEDS)
def test_given_folds_are_kept_and_blocks_are_dealt_within_them(pairs, seed):
    patients, folds = [str(patient) for patient, _ in pairs], np.array([fold for _, fold in pairs])
    fold, block = deal(patients, seed, folds)
    assert fold.dtype == block.dtype == np.int8
    assert (fold == folds).all()
    dealt = dict(zip(pairs, block, strict=True))
    assert [dealt[pair] for pair in pairs] == block.tolist()
    for k in range(FOLDS):
        sizes = np.bincount([at for (_, own), at in dealt.items() if own == k], minlength=BLOCKS)
        assert np.ptp(sizes) <= 1


@pytest.mark.parametrize("n", [100, LARGE + 100])
def test_the_folds_that_the_seed_gives_have_the_same_blocks_when_they_are_given(n):
    patients = numbered(n)
    fold, block = deal(patients, 7)
    again = deal(patients, 7, fold)
    assert (again[0] == fold).all()
    assert (again[1] == block).all()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9).map(str), st.sampled_from([None, "", np.nan, "train", "val", "test"]))))
def test_shared_patients_are_those_in_two_parts_and_an_absent_one_is_in_no_part(pairs):
    parts: dict[str, set[str]] = {}
    for patient, part in pairs:
        parts.setdefault(patient, set()).update({part} if isinstance(part, str) and part else ())
    shared = {patient for patient, its in parts.items() if len(its) > 1}
    found = shared_patients([patient for patient, _ in pairs], [part for _, part in pairs])
    if found is None:
        assert not shared
        return
    assert found.patients == len(shared)
    assert found.images == sum(patient in shared and isinstance(part, str) and part != "" for patient, part in pairs)
    assert len(found.examples) == min(SHOWN, len(shared))
    for example in found.examples:
        (patient,) = {pairs[at][0] for at in example.values()}
        assert set(example) == parts[patient]
        for part, at in example.items():
            assert at == next(n for n, pair in enumerate(pairs) if pair == (patient, part))


def test_shared_patients_are_told_in_a_sentence():
    found = shared_patients(["a", "b", "a", "b", "c"], ["train", "test", "val", "test", "train"])
    words = "1 patient with 2 images is in more than one part, such as row 0 in train and row 2 in val"
    assert found is not None
    assert found.in_words(lambda at: f"row {at}") == words
    patients = [str(n) for n in range(SHOWN + 1)] * 2
    many = shared_patients(patients, ["train"] * (SHOWN + 1) + ["test"] * (SHOWN + 1))
    assert many is not None
    assert many.in_words(str).endswith("2 in train and 6 in test; and others")
    assert many.in_words(str).startswith(
        "4 patients with 8 images are in more than one part, such as 0 in train and 4 in"
    )


def test_an_official_split_without_a_part_is_refused_with_its_name():
    def masks(*split):
        return official_masks(np.array(split, object))

    check_official(masks("train", "validate", "test", None))
    with pytest.raises(RunError, match="the set has no split of its own; use --split folds"):
        check_official(masks(None, None))
    with pytest.raises(
        RunError, match="the set's own split has no test rows, and a training needs all of train, val, test"
    ):
        check_official(masks("train", "validate", None))
    with pytest.raises(RunError, match="has no val and no test rows"):
        check_official(masks("train", "train"))
