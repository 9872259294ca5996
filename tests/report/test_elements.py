import math

import numpy as np

from pear_ray.report.elements import Line, Table, as_text, downsample, draw, interval, number, running_mean


def test_downsampling_keeps_the_largest_value() -> None:
    y = np.zeros(5000)
    y[4321], y[17] = 0.5, np.nan
    line = downsample(np.arange(5000.0), y, np.max)
    assert len(line.x) == len(line.y) == 300
    assert line.y.max() == 0.5
    assert np.isfinite(line.y).all()


def test_running_mean_is_the_mean_of_the_neighbors_that_exist() -> None:
    values = np.arange(10.0)
    slow = [values[max(0, i - 1) : i + 2].mean() for i in range(10)]
    np.testing.assert_allclose(running_mean(values, 3), slow)


def test_a_figure_takes_its_color_from_the_page_and_escapes_names() -> None:
    line = Line(np.arange(3.0), np.arange(3.0))
    figure = draw('a "b"', "nats", {"<x> $y$": line}, level=(1.0, "l"))
    assert "currentColor" in figure and "#102030" not in figure
    assert "<x>" not in figure and "&lt;x&gt; $y$" in figure
    label = "a &#34;b&#34;, nats by step: l at 1.000; &lt;x&gt; $y$ from 0.000 to 2.000."
    assert f'<svg role="img" aria-label="{label}"' in figure
    assert "<figcaption>a &#34;b&#34;</figcaption>" in figure


def test_a_figure_without_finite_values_is_empty() -> None:
    assert not draw("nothing", "nats", {"a": Line(np.arange(2.0), np.full(2, np.nan))})


def test_numbers_as_text() -> None:
    values = (None, math.nan, 0.0, 0.0391, 2.1e-5, 7, "", {"mean": 0.7, "sd": 0.2})
    texts = ["-", "-", "0.000", "0.039", "2.1e-05", "7", "-", "0.700 ± 0.200"]
    assert [as_text(value) for value in values] == texts
    assert number(0.0391, signed=True) == "+0.039"
    score = {"value": 0.1, "low": -0.2, "high": 0.4}
    assert as_text(score) == "0.100 [-0.200, 0.400]"
    assert interval(score, signed=True) == "+0.100 [-0.200, +0.400]"
    tiny = {"value": -2.1e-5, "low": -0.008, "high": 0.008}
    assert interval(tiny, signed=True) == "-0.000 [-0.008, +0.008]"


def test_a_cell_cannot_break_its_markdown_table() -> None:
    table = Table([{"a": "x|y\nz", "b_c": 0.5}])
    assert table.markdown().splitlines() == ["| a      | b c   |", "| ------ | ----- |", "| x\\|y z | 0.500 |"]
