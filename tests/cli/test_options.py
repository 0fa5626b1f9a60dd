"""The options of `train` and `study` are made from the configuration, and arguments from its values: there and back."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from damage import put
from hypothesis import given
from hypothesis import strategies as st

from cxrfast.cli.options import configured
from cxrfast.cli.study import study
from cxrfast.cli.training import train
from cxrfast.config import COMPILE_MODES, MOST_THREADS, Option, Runtime, TrainConfig, as_arguments, options_of
from cxrfast.errors import RunError
from cxrfast.shards.shard_set import ShardSet

LABELS = ("Edema", "Lung Opacity", "a=b")
REQUIRED: dict[str, Any] = {
    "set_id": "0" * 32,
    "scale": 64,
    "labels": LABELS,
    "global_batch": 8,
    "micro_batch": 4,
    "learning_rate": 1e-4,
}
PLACES: dict[str, Any] = {"shards": Path("set"), "runs": Path("runs")}
NUMBERS = {"minutes": st.floats(0.1, 1e6), "count": st.integers(1, 2**31)}
POLICIES = st.sampled_from(["u_zeros", "u_ones", "u_ignore"])
CHOSEN = {
    "policy": POLICIES,
    "label_policies": st.lists(st.tuples(st.sampled_from(LABELS), POLICIES), max_size=3).map(tuple),
    "blank": st.lists(
        st.tuples(st.sampled_from(["", *LABELS]), st.sampled_from(["negative", "ignore"])), max_size=3
    ).map(tuple),
    "split": st.sampled_from(["folds", "official", "auto"]),
    "precision": st.sampled_from(["auto", "bf16", "fp32"]),
    "micro_batch": st.integers(1, 10**6) | st.just("auto"),
    "sizes": st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 100)), max_size=3).map(tuple),
    "compile": st.sampled_from(COMPILE_MODES),
    "threads": st.integers(1, MOST_THREADS),
    "weight_decay": st.none() | st.floats(0, 0.9),
    "warmup": st.floats(0, 0.9),
    "degrees": st.floats(0, 180),
    "flip": st.floats(0, 1),
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._é-]{0,60}[A-Za-z0-9]", fullmatch=True),
}
"""Where not every value of the type makes sense."""
WORDS = st.text(st.characters(exclude_categories=["C"]), min_size=1)


def values(name: str, option: Option, kind: Any) -> st.SearchStrategy[Any]:
    if name in CHOSEN:
        return CHOSEN[name]
    if option.choices:
        return st.sampled_from(option.choices)
    if kind == Path | None:
        return WORDS.filter(lambda text: "://" not in text).map(Path)
    by_type = {bool: st.booleans(), int: st.integers(1, 2**31 - 1), float: st.floats(1e-9, 5e5), str: WORDS}
    by_type |= {int | None: by_type[int], str | None: WORDS, tuple[str, ...]: st.lists(WORDS).map(tuple)}
    return by_type[kind]


def some_of(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Values of any of the fields that have an option."""
    return st.fixed_dictionaries({}, optional={n: values(n, o, t) for n, (o, t, _) in options_of(kind).items()})


@given(some_of(TrainConfig), some_of(Runtime))
def test_what_is_written_as_arguments_is_read_as_the_same_configuration(training, runtime):
    arguments = as_arguments({**training, **runtime})
    parsed, where = configured(train.make_context("train", ["--scale=64", *arguments]).params)
    assert Runtime(**PLACES, **where) == Runtime(**PLACES, **runtime)
    micro_batch = {"micro_batch": 4} if training.get("micro_batch") == "auto" else {}
    assert parsed.get("micro_batch") == training.get("micro_batch")
    assert TrainConfig(**{**REQUIRED, **parsed, **micro_batch}) == TrainConfig(
        **{**REQUIRED, **training, **micro_batch}
    )
    arguments = as_arguments({**training, **{name: v for name, v in runtime.items() if name != "name"}})
    options = study.make_context("study", ["set", "runs", *arguments]).params
    assert configured(options) == (parsed, {name: v for name, v in where.items() if name != "name"})


def test_a_field_without_an_option_has_no_argument():
    with pytest.raises(RunError, match="patience has no command-line option"):
        as_arguments({"patience": 5})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --scale 32 --sizes 64", "'64' is not SIDExEPOCHS,…, such as 64x2,96x2"),
        ("train --scale 32 --sizes 64xmany", "'64xmany' is not SIDExEPOCHS"),
        ("train --scale 32 --label-policy Edema", "'Edema' is not LABEL=POLICY, such as Edema=u_ones"),
        ("train --scale 32 --unlabelled ignore", "'ignore' is not one of 'drop', 'negative'"),
        ("train --scale 32 --micro-batch 0", "0 is not in the range x>=1"),
        ("train --scale 32 --shards s3://bucket/set", "s3://bucket/set is a URL"),
        ("shard --scale 32,big", "'32,big' is not a whole number of px, such as 256 or 256,1024"),
        ("shard --scale 32,7", "--scale 7 is not between 8 and 4096 px"),
        ("shard --scale 32 --part 9/8", "'9/8' is not I/N, such as 2/8"),
        ("study set runs --rate 48=fast", "'48=fast' is not SCALE=IMAGES_PER_S, such as 2048=75"),
        ("study set runs --rate 48=inf", "'48=inf' is not SCALE=IMAGES_PER_S"),
        ("study set runs --rate 48=3", "--slurm, --walltime and --rate need --dry-run or --sbatch"),
        ("bench load --minutes nan", "nan is not"),
        ("bench step --seconds inf", "inf is not"),
    ],
)
def test_a_value_of_the_wrong_form_is_refused_with_an_example(command, message):
    done = invoke(*command.split())
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_scales_may_be_joined_by_commas(tiny_set, tmp_path):
    for options in (["--scale", "64,32"], ["--scale", "32", "--scale", "64"]):
        assert invoke("stage", tiny_set, tmp_path / "copy", *options).exit_code == 0
        assert ShardSet(tmp_path / "copy").scales == [32, 64]
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = [1, 2]", "epochs = '[1, 2]' must be a number or text, not a list"),
        ("epochs = true", "epochs = 'True' must be a number or text, not true or false"),
        ("epochs = 2020-01-01", "must be a number or text, not a date or time"),
        (r'stage = "\u0000"', "holds the character U+0000"),
        (r'view = ["PA", "A\u0000"]', "holds the character U+0000"),
        ("[epochs]\nx = 1", "must be a number or text, not a table"),
        ("epochs = nan", "Invalid value for '--epochs'"),
        ("epochs = inf", "Invalid value for '--epochs': 'inf' is not a valid integer"),
        ("epochs = 1.5", "Invalid value for '--epochs': '1.5' is not a valid integer"),
        ("epochs = 0x" + "f" * 5000, "epochs = 'a number of thousands of digits' is too large"),
        ("view = [1, ['PA']]", "must be a number or text, not a list"),
        ("profile = 'no'", "profile = 'no' must be true or false"),
        ("cache = 5", "cache = '5' must be text"),
        ("shards = -1", "shards = '-1' must be text"),
        ("a = " + "[" * 100_000, "is not a TOML file"),
        ("'\\u001b[31m' = 1", r"sets '\\u001b[31m', which is not an option"),
        ("config = 'other.toml'", "sets 'config', which is not an option"),
        ("epochs = " + "9" * 5000, "is not a TOML file"),
    ],
)
def test_a_file_of_options_with_other_values_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "options.toml"
    file.write_text(text)
    done = invoke("train", "--scale=32", "--shards=set", f"--config={file}")
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "loop", "huge", "bytes", "absent"])
def test_what_is_not_a_file_of_options_is_refused_and_never_waited_for(tmp_path, kind):
    file = tmp_path / "options.toml"
    if kind == "bytes":
        file.write_bytes(b"\xff\xfe\0")
    else:
        put(kind, file)
    done = invoke("train", "--scale=32", "--shards=set", f"--config={file}")
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert "cannot be read" in done.stderr or "is not a TOML file" in done.stderr


def test_a_file_of_options_may_start_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "options.toml"
    file.write_bytes(b"\xef\xbb\xbfscale = 64\n")
    assert train.make_context("train", [f"--config={file}"]).params["scale"] == 64
