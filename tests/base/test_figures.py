"""Names in figures are drawn as they are spelt."""

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxrfast.figures import LONGEST, add_legend, figure_text
from cxrfast.files import write_figure


def drawn(figure: Figure, text: str) -> str:
    """What matplotlib draws for a text, and that it takes it for no formula."""
    made = figure.text(0, 0, text)
    spelt, is_formula = made._preprocess_math(made.get_text())
    assert not is_formula
    return spelt


@given(st.text(st.sampled_from("$\\_^%&#{}x1 "), min_size=1, max_size=LONGEST))
def test_a_name_is_drawn_as_it_is_spelt(name):
    assert drawn(Figure(), figure_text(name)) == " ".join(name.split())


@pytest.mark.parametrize("name", ["$x_1$", r"$\frac{", r"\$a$b$", "$$", "100 %", "_hidden", "a\nb", "$\\badcommand$"])
def test_every_name_can_be_drawn_and_is_in_the_legend(name):
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(figure_text(name))
    axes.set_xticks([0], [figure_text(name)])
    legend = add_legend(figure, [Line2D([], []), Line2D([], [])], [name, "b"])
    figure.draw_without_rendering()
    spelt = " ".join(name.split())
    assert [drawn(figure, text.get_text()) for text in legend.get_texts()] == [spelt, "b"]


def test_a_long_name_is_cut_in_its_middle_and_an_invisible_character_is_shown():
    name = "".join(chr(ord("a") + i % 26) for i in range(200))
    cut = figure_text(name)
    assert len(cut) == LONGEST
    start, end = cut.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert re.fullmatch(r"a\\x1bb\\u202e", figure_text("a\x1bb\u202e"))


def test_characters_that_the_font_lacks_are_named_in_one_line(tmp_path, caplog):
    figure = Figure()
    figure.text(0, 0, "\u80ba \u80ba \u5fc3 Edema")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_figure(tmp_path / "figure.png", figure)
    assert caplog.messages == [
        f"{tmp_path / 'figure.png'}: the figure's font lacks \u5fc3 \u80ba, and boxes stand for them"
    ]
