import pytest

from cxrfast.pipelines.loader import HEADROOM, Rates, choose

MEASURED = {
    "Card": [
        Rates(scale=256, host=1_750, dali=20_000, step=5_700),
        Rates(scale=2048, host=60, dali=900, step=90),
    ]
}
"""Made up: what decides is how they compare."""


@pytest.mark.parametrize("has_dali", [False, True])
def test_a_cpu_decodes_in_its_own_threads(has_dali: bool) -> None:
    assert choose(None, has_dali, 256, 64)[0] == "host"


def test_without_dali_the_host_decodes_and_says_so() -> None:
    engine, why = choose("Card", False, 256, 1, MEASURED)
    assert engine == "host"
    assert "not installed" in why


def test_a_gpu_that_nobody_has_measured_takes_dali_and_says_that_it_is_a_guess() -> None:
    engine, why = choose("Another card", True, 256, 16, MEASURED)
    assert engine == "dali"
    assert "Another card has not been measured" in why
    assert "--engine host" in why


@pytest.mark.parametrize(
    ("scale", "threads", "expected"),
    [
        (256, 3, "dali"),  # 5,250 a second do not feed 5,700
        (256, 4, "host"),  # 7,000 do, with headroom
        (2048, 1, "dali"),
        (2048, 2, "host"),
        (1800, 2, "host"),  # the nearest scale counts
    ],
)
def test_the_host_decodes_where_its_threads_feed_the_step_with_room_to_spare(
    scale: int, threads: int, expected: str
) -> None:
    engine, why = choose("Card", True, scale, threads, MEASURED)
    assert engine == expected
    assert f"{threads} host threads give" in why


def test_where_neither_feeds_the_step_the_faster_one_decodes() -> None:
    slow = {"Card": [Rates(scale=256, host=100, dali=500, step=10_000)]}
    assert choose("Card", True, 256, 4, slow)[0] == "dali"
    assert choose("Card", True, 256, 6, slow)[0] == "host"


def test_headroom_is_room() -> None:
    assert HEADROOM > 1
