import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.building.layout import assign_rows, check_scales, rows_per_shard, set_id
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import COLUMNS
from cxrfast.shuffle import permutation
from cxrfast.splits import deal

KEYS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=2)


def images(n: int = 40) -> pd.DataFrame:
    numbers = np.arange(n)
    return pd.DataFrame(
        {
            "image_id": [f"{(7 * i) % n:04d}" for i in numbers],
            "study_id": [f"s{i // 2}" for i in numbers],
            "patient_id": [f"p{i // 4}" for i in numbers],
            "path": [f"files/p{i // 20}/{i}.jpg" for i in numbers],
            "view": "AP",
            "height": 10,
            "width": 9,
            "split": "train",
            "Edema": 1.0,
            "Fracture": np.nan,
        }
    )


def identity(table: pd.DataFrame, **recipe) -> str:
    return set_id(assign_rows(table, ("Edema", "Fracture"), recipe.get("seed", 0)), ImageRecipe(**recipe))


@settings(max_examples=60)
@given(st.integers(0, 3000), KEYS)
def test_a_permutation_holds_every_number_once_and_depends_on_its_key_alone(n, key):
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    drawn = permutation(n, *key)
    assert drawn.dtype == np.int64
    np.testing.assert_array_equal(np.sort(drawn), np.arange(n))
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(permutation(n, *key), drawn)


@settings(max_examples=30)
@given(KEYS, KEYS)
def test_other_keys_give_other_permutations_that_do_not_resemble_each_other(key, other):
    if [*key, 0][:2] == [*other, 0][:2]:
        return
    one, two = permutation(2000, *key), permutation(2000, *other)
    assert (one == two).mean() < 0.01
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.15


@settings(max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(0, 2**63 - 1))
def test_rows_do_not_depend_on_the_order_of_the_source_s_tables(random, seed):
    order = list(range(40))
    random.shuffle(order)
    rows = assign_rows(images(), ("Edema", "Fracture"), seed)
    pd.testing.assert_frame_equal(assign_rows(images().iloc[order], ("Edema", "Fracture"), seed), rows)
    assert rows["row"].tolist() == list(range(40))
    assert list(rows.columns) == [*COLUMNS, "Edema", "Fracture"]
    together = images().set_index("image_id").loc[rows["image_id"]]
    assert rows["path"].tolist() == together["path"].tolist(), "an image keeps its own line"
    fold, block = deal(rows["patient_id"].tolist(), seed)
    assert rows["fold"].tolist() == fold.tolist()
    assert rows["block"].tolist() == block.tolist()


def test_rows_are_permuted_and_differently_by_seed_which_alone_changes_the_set_id():
    one, two = (assign_rows(images(), (), seed)["image_id"].tolist() for seed in (0, 1))
    assert one != sorted(one)
    assert one != two
    rows = assign_rows(images(), (), 0)
    assert set_id(rows, ImageRecipe(seed=0)) != set_id(rows, ImageRecipe(seed=1))


@pytest.mark.parametrize(
    ("changed", "recipe", "same"),
    [
        (images().iloc[1:], {}, False),
        (images(41), {}, False),
        (images().replace({"image_id": {"0003": "9999"}}), {}, False),
        (images().replace({"patient_id": {"p3": "p4"}}), {}, False),
        (images(), {"seed": 1}, False),
        (images(), {"quality": 94}, False),
        (images(), {"codec": "raw"}, False),
        (images(), {"dct": "accurate"}, True),
        (images(), {"dct": "fast"}, False),
        (images().assign(path="other", view="other", split="other", study_id="other", Edema=0.0), {}, True),
    ],
)
def test_the_set_id_changes_with_an_image_a_patient_and_every_part_of_the_recipe_alone(changed, recipe, same):
    assert (identity(changed, **recipe) == identity(images())) is same


def test_permutations_and_set_ids_are_the_same_in_every_version():
    assert permutation(10, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    assert identity(images(), dct="fast") == "e7306155b6d0a1573e595c3d76dd4443"
    assert identity(images()) == identity(images(), codec="jpeg", quality=95) == "7cf114d72c544a31f13e8193cd0d3cf0"
    assert identity(images(), codec="raw") == "41286f57e3b7122fb1f72c52a0869fb6"


@given(st.integers(1, 500_000))
def test_shards_hold_64_to_1024_rows_and_there_are_enough_of_them_to_share(n):
    rows = rows_per_shard(n)
    assert 64 <= rows <= 1024
    assert rows <= max(64, -(-n // 64)), "64 shards wherever they need not fall below 64 rows"
    assert rows == 1024 or -(-n // rows) <= 64


def test_scales_are_sorted_and_unique_and_one_out_of_range_is_named():
    assert check_scales([512, 64, 512, 8, 4096]) == [8, 64, 512, 4096]
    for scale in (7, 4097, 0, -64):
        with pytest.raises(ShardError, match=rf"--scale {scale} is not between 8 and 4096"):
            check_scales([64, scale])
    with pytest.raises(ShardError, match="add --scale 256"):
        check_scales([])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        *(({"quality": value}, f"--quality {value} is not between") for value in (0, 101)),
        *(({"seed": value}, f"--seed {value} is not between") for value in (-1, 2**63)),
        ({"codec": "raw", "quality": 95}, "--quality 95 is for JPEG"),
        ({"codec": "raw", "dct": "accurate"}, "'accurate' is unknown: use accurate or fast, for JPEG only"),
        ({"dct": "slow"}, "dct 'slow' is unknown"),
        *(({name: value}, value) for name, value in (("codec", "png"), ("resize", "crop"), ("grey", "colour"))),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(recipe, message):
    with pytest.raises(ShardError, match=message):
        ImageRecipe(**recipe)
