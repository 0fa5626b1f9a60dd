import pytest

from cxrfast.units import counted


@pytest.mark.parametrize(("n", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")])
def test_one_is_singular_and_thousands_are_grouped(n: int, text: str) -> None:
    assert counted(n, "row") == text
