import math

import numpy as np

from pear_ray.report.figures import Line, draw, gathered, running_mean
from pear_ray.report.format import as_markdown, interval, number
from pear_ray.report.section import Table


def test_many_steps_are_gathered_without_losing_the_largest() -> None:
    y = np.zeros(5000)
    y[4321], y[17] = 0.5, np.nan
    line = gathered(np.arange(5000.0), y, np.max)
    assert len(line.x) == len(line.y) == 300
    assert line.y.max() == 0.5
    assert np.isfinite(line.y).all()


def test_running_mean_is_the_mean_of_the_neighbors_that_exist() -> None:
    values = np.arange(10.0)
    slow = [values[max(0, i - 1) : i + 2].mean() for i in range(10)]
    np.testing.assert_allclose(running_mean(values, 3), slow)


def test_a_figure_takes_its_ink_from_the_page_and_escapes_names() -> None:
    panel = draw(
        'a "b"', "nats", {"<x> $y$": Line(np.arange(3.0), np.arange(3.0))}, level=(1.0, "l")
    )
    assert panel is not None
    assert "currentColor" in panel.svg and "#102030" not in panel.svg
    assert "<x>" not in panel.svg and "&lt;x&gt; $y$" in panel.svg
    assert panel.svg.startswith('<svg role="img" aria-label="a &#34;b&#34;, nats by step: ')
    assert draw("nothing", "nats", {"a": Line(np.arange(2.0), np.full(2, np.nan))}) is None


def test_numbers_as_words() -> None:
    assert [number(x) for x in (None, math.nan, 0.0, 0.0391, 2.1e-5)] == [
        "-",
        "-",
        "0.000",
        "0.039",
        "2.1e-05",
    ]
    assert (
        interval({"value": 0.1, "low": -0.2, "high": 0.4}, signed=True) == "+0.100 [-0.200, +0.400]"
    )
    around_nothing = {"value": -2.1e-5, "low": -0.008, "high": 0.008}
    assert interval(around_nothing, signed=True) == "-0.000 [-0.008, +0.008]"


def test_a_cell_cannot_break_its_markdown_table() -> None:
    table = Table(("a", "b"), (("x|y\nz", ("0.5", 0.5)),))
    assert as_markdown(table).splitlines()[2] == "| x\\|y z | 0.5 |"
