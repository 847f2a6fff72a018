import io
import re
import subprocess
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from helpers.runs import make_samples
from PIL import Image

from metatpt.results import plots

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
ALL = [plots.reliability_diagram, plots.class_gains, plots.entropies, plots.durations]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_reliability_is_that_of_a_plain_count():
    rows = make_samples(90, NAMES)
    axes = plots.reliability_diagram(rows).axes
    shown = {line.get_label().rpartition(" %")[0].rpartition(" ")[0]: line for line in axes[0].lines[1:]}
    assert list(shown) == ["zero-shot", "averaged", "adapted"]
    for (name, prefix), below in zip(
        [("zero-shot", "zero_shot_"), ("averaged", "averaged_"), ("adapted", "")], axes[1].lines, strict=True
    ):
        expected = []
        for k in range(15):
            of_bin = [row for row in rows if k / 15 <= row[f"{prefix}probability"] < (k + 1) / 15]
            if of_bin:
                confidence = np.mean([row[f"{prefix}probability"] for row in of_bin])
                correct = np.mean([row[f"{prefix}prediction"] == row["label"] for row in of_bin])
                expected.append((100 * confidence, 100 * correct, 100 * len(of_bin) / 90))
        assert shown[name].get_xydata() == pytest.approx(np.array(expected)[:, :2])
        assert below.get_ydata() == pytest.approx(np.array(expected)[:, 2])


def bars(figure):
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(names, (bar.get_width() for bar in axes.patches), strict=True))


def test_class_gains_are_those_of_a_plain_count():
    rows = make_samples(90, NAMES)
    expected = {}
    for name in NAMES:
        of_class = [row for row in rows if row["label"] == name]
        right = sum(row["prediction"] == name for row in of_class)
        expected[name] = 100 * (right - sum(row["zero_shot_prediction"] == name for row in of_class)) / 15
    shown = bars(plots.class_gains(rows))
    assert shown == pytest.approx(expected)
    assert list(shown.values()) == sorted(shown.values(), reverse=True)


def test_classes_of_equal_names_are_told_apart():
    shown = bars(plots.class_gains(make_samples(12, ["crane", "bee", "crane"])))
    assert set(shown) == {"crane (0)", "bee", "crane (2)"}


def test_of_many_classes_both_ends_are_shown():
    figure = plots.class_gains(make_samples(300, [f"class {i}" for i in range(100)]))
    values = list(bars(figure).values())
    assert len(values) == 24
    assert values[11] > 0 >= values[-1]
    assert "12 largest and 12 smallest of 100 classes" in texts(plots.svg(figure, "a", "b"))


def test_entropies_are_shares_of_all_pictures():
    rows = make_samples(60, NAMES, skipped=[3])
    (axes,) = plots.entropies(rows).axes
    for prefix, stairs in zip(["zero_shot_", "averaged_", ""], axes.patches, strict=True):
        entropy = [row[f"{prefix}entropy"] for row in rows if row["status"] == "ok"]
        values, edges, _ = stairs.get_data()
        assert values.sum() == pytest.approx(100)
        assert edges[0] <= min(entropy)
        assert edges[-1] >= max(entropy)
        assert stairs.get_label().endswith(f" {np.mean(entropy):.2f}")


def test_durations_leave_out_the_slowest_hundredth():
    rows = [{"milliseconds": 10.0 + i} for i in range(199)] + [{"milliseconds": 1e6}, {"milliseconds": None}]
    values, edges, _ = plots.durations(rows).axes[0].patches[0].get_data()
    assert values.sum() == pytest.approx(100)
    assert edges[-1] < 300
    assert plots.durations([{"milliseconds": 5.0}] * 3) is not None


def test_intervals_reach_from_low_to_high():
    values = {"averaged_": [None, (0.1, 0.1, 0.1)], "": [(0.05, -0.01, 0.2), (0.0, 0.0, 0.0)]}
    (axes,) = plots.intervals(["first", "second"], values, "gain").axes
    _, adapted = axes.containers
    segments = adapted.lines[2][0].get_segments()
    assert segments[0][:, 0] == pytest.approx([-1, 20])
    assert adapted.lines[0].get_xdata() == pytest.approx([5, 0])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first one at the top


def test_what_the_rows_do_not_say_is_not_plotted():
    unlabelled = make_samples(5, NAMES, labelled=False)
    assert [plot(unlabelled) is None for plot in ALL] == [True, True, False, False]
    assert [plot([]) for plot in ALL] == [None] * 4
    nothing = make_samples(2, NAMES, skipped=[0, 1])
    assert [plot(nothing) for plot in ALL] == [None] * 4


@pytest.mark.parametrize("plot", ALL)
def test_one_svg_serves_both_themes(plot):
    rows = make_samples(40, NAMES)
    svg = plots.svg(plot(rows), "one", 'What it is <&">')
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= set(plots.THEME)
    assert "http" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(each.startswith("one-") for each in ids)
    referred = re.findall(r'(?:url\(|href=")#([^)"]*)', svg)
    assert set(referred) <= set(ids)
    assert 'aria-label="What it is &lt;&amp;&quot;&gt;"' in svg
    assert svg == plots.svg(plot(rows), "one", 'What it is <&">')


def test_names_are_text_and_no_markup():
    names = ['<b>&"', "cost $x_1$ and $y$", "鹤 \x1b[2J\n", "a" * 40]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a glyph that matplotlib's font does not have
        figure = plots.class_gains(make_samples(8, names))
        svg = plots.svg(figure, "one", "gains")
        plots.png(figure)
    assert {'&lt;b&gt;&amp;"', "cost $x_1$ and $y$", "鹤 [2J", "a" * 25 + "…"} <= set(texts(svg))


def test_png_is_on_white_paper():
    picture = Image.open(io.BytesIO(plots.png(plots.entropies(make_samples(10, NAMES)))))
    assert picture.size == (900, 680)
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_users_own_style_is_left_alone_and_has_no_say():
    rows = make_samples(10, NAMES)
    before = plots.svg(plots.entropies(rows), "one", "")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert plots.svg(plots.entropies(rows), "one", "") == before
        assert mpl.rcParams["font.size"] == 30


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_have_contrast_on_their_paper(theme):
    paper = luminance(plots.THEME["paper"][theme])
    for name in ("ink", "muted", "zero-shot", "averaged", "adapted"):
        light, dark = sorted([paper, luminance(plots.THEME[name][theme])], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name  # WCAG 2.1, 1.4.3


def test_who_plots_nothing_does_not_import_matplotlib():
    code = "import sys, metatpt.results.plots, metatpt.results.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
