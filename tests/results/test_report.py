import base64
import csv
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.runs import make_samples, write_run
from PIL import Image
from scipy.stats import binomtest

from metatpt.results.comparison import compare
from metatpt.results.report import write_report
from metatpt.results.runs import largest_changes, read_run

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
VOID = {"meta", "img", "br", "hr", "link", "input"}
KINDS = {"zero-shot": "zero_shot_", "averaged": "averaged_", "adapted": ""}


class Page(HTMLParser):
    """A page as its text, its tables and its attributes; that its tags are balanced is asserted."""

    def __init__(self, text):
        super().__init__()
        self.source = text
        self.open, self.attributes, self.tables, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "small" and "table" in self.open:
            self.tables[-1][-1][-1] += " | "

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += " ".join(data.split(" ")).strip("\n")

    def table(self, *names):
        """The rows of the table with these words in its head, by the first cell."""
        (found,) = [table for table in self.tables if all(name in " ".join(table[0]) for name in names)]
        return {row[0].partition(" | ")[0].strip(): [cell.strip() for cell in row[1:]] for row in found[1:]}

    @property
    def accuracies(self):
        """The table of a run's accuracies, by their name."""
        return {row[0].partition(" | ")[0]: row[1:] for row in self.tables[0][1:]}


def report(*folders, to):
    return Page(write_report([read_run(folder) for folder in folders], to).read_text(encoding="utf-8"))


def cells(run):
    with (run / "predictions.csv").open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["prediction"]]


def right(rows, prefix):
    return np.array([row[f"{prefix}prediction_index"] == row["label_index"] for row in rows], dtype=float)


@pytest.fixture
def without_plots(monkeypatch):
    """Plots take seconds: not where they are not looked at."""
    monkeypatch.setattr("metatpt.results.report._ONE_RUN", {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = "data:\n  class_path: PetsDataModule\n  init_args:\n    shift: noise\n    severity: 4\n"
    rows = make_samples(120, NAMES, skipped=[7, 50])
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", rows, NAMES, config=config, split="official")
    (folder / "views").mkdir()
    for index in kept_views(folder):
        Image.new("RGB", (12, 4), (index, 0, 0)).save(folder / "views" / f"{index}.png")
    seconds = {"data": 1.0, "views": 2.0, "image_tower": 5.0, "text_tower": 2.0, "other": 0.0}
    (folder / "cost.json").write_text(json.dumps({"pictures": 120, "seconds": seconds, "peak_memory_mb": 9}))
    return folder


def kept_views(run):
    gains, losses = largest_changes(read_run(run).rows, 6)
    return [row["index"] for row in (gains[0], gains[5], losses[1])]


@pytest.fixture(scope="module")
def page(run):
    """Its report, which lies in its folder."""
    return report(run, to=run)


def test_figures_are_those_of_the_predictions(run, page):
    table, rows = page.accuracies, cells(run)
    for place, prefix in enumerate(KINDS.values()):
        correct = right(rows, prefix)
        low, high = binomtest(int(correct.sum()), len(rows)).proportion_ci(method="wilson")
        assert table["top-1 accuracy"][place] == f"{100 * correct.mean():.1f} % | {100 * low:.1f} to {100 * high:.1f}"
        top5 = np.mean([int(row[f"{prefix}label_rank"]) <= 5 for row in rows])
        assert table["top-5 accuracy"][place] == f"{100 * top5:.1f} %"
        nll = np.mean([-math.log(float(row[f"{prefix}label_probability"])) for row in rows])
        assert table["negative log-likelihood"][place] == f"{nll:.3f}"
        confidence = np.array([float(row[f"{prefix}probability"]) for row in rows])
        bins = [(confidence >= k / 15) & (confidence < (k + 1) / 15) for k in range(15)]
        ece = sum(abs((correct[each] - confidence[each]).sum()) for each in bins) / len(rows)
        assert table["calibration error"][place] == f"{100 * ece:.1f} %"


def test_gains_are_those_of_the_predictions(run, page):
    table, rows = page.table("over", "put right"), cells(run)
    pairs = [("adapted", "zero-shot"), ("averaged", "zero-shot"), ("adapted", "averaged")]
    assert list(table) == [f"{after} over {before}" for after, before in pairs]
    random = np.random.default_rng(1)
    for after, before in pairs:
        change = right(rows, KINDS[after]) - right(rows, KINDS[before])
        shown, won, lost, n = table[f"{after} over {before}"]
        points, low, _, high = shown.replace(" | ", " ").split(" ")
        assert points == f"{100 * change.mean():+.1f}"
        expected = np.quantile(random.choice(change, (4000, len(change))).mean(1), [0.025, 0.975])
        assert [float(low), float(high)] == pytest.approx(100 * expected, abs=1.2)  # a step of 1/118 and a bit
        assert [int(won), int(lost), int(n)] == [(change > 0).sum(), (change < 0).sum(), 118]


def test_headline_says_it_in_words(run, page):
    metrics = json.loads((run / "metrics.json").read_text())
    points = {name: f"{100 * metrics[name]:+.1f}" for name in ("gain", "gain_low", "gain_high")}
    assert "<title>MetaTPTModule on PetsDataModule, official, shift noise of severity 4</title>" in page.source
    assert (
        f"from {100 * metrics['zero_shot_accuracy']:.1f} % (zero-shot) to {100 * metrics['accuracy']:.1f} % : "
        f"a gain of {points['gain']} points (95 % interval {points['gain_low']} to {points['gain_high']}), "
        "over 118 pictures."
    ) in page.text
    assert f"without tuning, give {100 * metrics['averaged_accuracy']:.1f} %" in page.text
    assert "120 of 240 pictures of the split, 118 labelled, 2 skipped, 0 kept zero-shot" in page.text
    assert "holds 0" not in page.text


@pytest.mark.usefixtures("without_plots")
def test_a_gain_that_may_be_none_is_called_so(tmp_path):
    run = write_run(tmp_path / "run", make_samples(6, NAMES, seed=5), NAMES)
    metrics = read_run(run).metrics
    assert metrics["gain_low"] <= 0 <= metrics["gain_high"]
    assert "The interval holds 0" in report(run, to=tmp_path).text


def test_classes_are_those_of_the_predictions(run, page):
    table, rows = page.table("class", "index"), cells(run)
    for name in NAMES:
        of_class = [row for row in rows if row["label"] == name]
        zero_shot, averaged, adapted = (right(of_class, prefix).mean() for prefix in KINDS.values())
        assert table[name] == [
            *(str(NAMES.index(name)), str(len(of_class))),
            *(f"{100 * share:.1f} %" for share in (zero_shot, averaged, adapted)),
            f"{100 * (adapted - zero_shot):+.1f}",
        ]
    gains = [float(row[-1]) for row in table.values()]
    assert gains == sorted(gains, reverse=True)


def test_the_page_needs_nothing_else(run, page):
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert value.startswith(("#", "data:")), (name, value)
        assert not re.search(r"url\((?!#)", value or "")
    assert "script" not in page.source
    assert "@import" not in page.source
    assert "default-src 'none'" in page.source
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pngs = sorted(file.name for file in (run / "plots").iterdir())
    assert pngs == ["class_gains.png", "durations.png", "entropies.png", "reliability.png"]


def test_the_same_run_gives_the_same_files(run, page, tmp_path):
    assert report(run, to=tmp_path).source == page.source
    for file in (run / "plots").iterdir():
        assert file.read_bytes() == (tmp_path / "plots" / file.name).read_bytes(), file


def test_every_colour_is_there_in_both_themes(page):
    source = page.source
    light, dark = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", source))
    assert used <= set(re.findall(r"(--[\w-]+):", light))
    assert used <= set(re.findall(r"(--[\w-]+):", dark))


def test_names_and_paths_are_no_markup(tmp_path):
    names = ['<b>&"', "<script>alert(1)</script>", "plain"]
    rows = make_samples(9, names, skipped=[4], path='<img src="http://example.org/{}">')
    run = write_run(tmp_path / "<i>run", rows, names, method="<u>")
    (run / "views").mkdir()
    Image.new("RGB", (4, 4)).save(run / "views" / "1.png")
    page = report(run, to=tmp_path)
    assert not re.search(r"<(b|i|u|script)>", page.source)
    assert all("example.org" not in (value or "") for name, value in page.attributes if name != "alt")
    assert '<b>&"' in page.text
    assert '<img src="http://example.org/4"> : truncated <file>' in page.text


def test_pictures_that_changed_most_come_with_their_views(run, page):
    gains, losses = largest_changes(read_run(run).rows, 6)
    shown = [value for name, value in page.attributes if name == "src"]
    files = [(run / "views" / f"{index}.png").read_bytes() for index in kept_views(run)]
    assert [base64.b64decode(each.removeprefix("data:image/png;base64,")) for each in shown] == files
    paths = re.findall(r'<p class="path">(\d+)\.png</p>', page.source)
    assert [int(path) for path in paths] == [
        *(row["index"] for row in (*gains[:4], gains[5])),
        *(row["index"] for row in losses[:4]),
    ]
    first = gains[0]
    assert (
        f"label: {first['label']} , its probability {100 * first['zero_shot_label_probability']:.1f} % to "
        f"{100 * first['label_probability']:.1f} %"
    ) in page.text
    assert f"adapted {first['prediction']} ({100 * first['probability']:.1f} %, right)" in page.text
    assert "ViewGallery" not in page.text


def test_cost(page):
    (table,) = [each for each in page.tables if each[0][0] == "images per second"]
    values = {name: value for name, value in table}
    assert values["images per second"] == "30"
    assert values["peak memory"] == "1,234 MB"
    milliseconds = [50 + i for i in range(120) if i not in (7, 50)]
    assert values["milliseconds per picture, median"] == f"{np.median(milliseconds):.0f}"
    assert values["milliseconds per picture, longest"] == "169"
    assert page.table("where the time of 120 pictures went")["image tower"] == ["5.0", "50.0 %"]


@pytest.mark.usefixtures("without_plots")
def test_left_out_pictures_are_named_and_capped(tmp_path):
    run = write_run(tmp_path / "run", make_samples(30, NAMES, skipped=range(3, 16)), NAMES)
    page = report(run, to=tmp_path)
    assert "13 pictures skipped" in page.text
    assert "12.png : truncated <file>" in page.text
    assert "13.png : " not in page.text
    assert "... and 3 more in predictions.csv" in page.text


def test_without_labels_there_are_no_accuracies(tmp_path):
    run = write_run(tmp_path / "run", make_samples(20, NAMES, labelled=False), NAMES, stage="predict")
    page, rows = report(run, to=tmp_path), cells(run)
    changed = sum(row["prediction"] != row["zero_shot_prediction"] for row in rows)
    assert f"so there are no accuracies. Adaptation changed the prediction of {changed} of 20 pictures" in page.text
    assert not re.search(r"top-1|calibration|interval|right\b|wrong\b", page.text)
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["durations.png", "entropies.png"]
    assert re.search(r"entropy \d\.\d\d to \d\.\d\d nats", page.text)


@pytest.mark.usefixtures("without_plots")
def test_without_views_nothing_is_averaged(tmp_path):
    run = write_run(tmp_path / "run", make_samples(20, NAMES, averaged=False), NAMES)
    page = report(run, to=tmp_path)
    assert "averaged" not in page.text
    assert len(page.accuracies["top-1 accuracy"]) == 2
    assert "There are no views of them" in page.text


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(("n", "setup"), [(10, {"stage": "validate"}), (0, {"stage": "test"})])
def test_a_run_that_was_stopped_says_so(tmp_path, n, setup):
    run = write_run(tmp_path / "my run", make_samples(n, NAMES), NAMES, complete=False, **setup)
    page = report(run, to=tmp_path)
    assert f"this run has not ended. What follows is over the {n} pictures" in page.text
    assert f"metatpt {setup['stage']} --resume '{run}' goes on with it" in page.text
    assert ("top-1 accuracy" in page.text) == (n > 0)
    assert ("No picture has been processed yet" in page.text) == (n == 0)


@pytest.mark.usefixtures("without_plots")
def test_a_run_without_setup_has_the_name_of_its_folder(tmp_path):
    run = write_run(tmp_path / "run", make_samples(4, NAMES), NAMES, complete=False)
    (run / "setup.json").unlink()
    assert "<title>run</title>" in report(run, to=tmp_path).source


def test_a_thousand_classes(tmp_path):
    names = [f"class {i}" for i in range(1000)]
    names[3] = names[4] = "crane"
    run = write_run(tmp_path / "run", make_samples(1500, names), names)
    page = report(run, to=tmp_path)
    table = page.table("class", "index")
    assert len(table) == 24
    assert "The 12 largest and 12 smallest gains of 1,000 classes" in page.text
    gains = [float(row[-1]) for row in table.values()]
    assert gains == sorted(gains, reverse=True)
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_runs_beside_each_other(run, tmp_path):
    config = "data:\n  class_path: PetsDataModule\n  init_args:\n    shift: noise\n    severity: 5\n"
    rows = make_samples(90, NAMES, seed=1, skipped=[9])
    other = write_run(tmp_path / "other", rows, NAMES, config=config, method="TPTModule", complete=False)
    page = report(run, other, to=tmp_path / "report")
    assert "2 runs beside each other" in page.text
    table = page.table("over the first run")
    first, second = cells(run), {str(row["index"]): row for row in rows if row["status"] == "ok"}
    assert table["1 run"][-1] == "the first run"
    both = [(row, second[row["index"]]) for row in first if row["index"] in second]
    assert len(both) == 87  # 90, but for 7, 50 and 9
    change = [(b["prediction"] == b["label"]) - int(a["prediction"] == a["label"]) for a, b in both]
    points, interval, n = table["2 other"][-1].split(" | ")
    assert points == f"{100 * np.mean(change):+.1f}"
    low, high = np.quantile(np.random.default_rng(1).choice(change, (4000, 87)).mean(1), [0.025, 0.975])
    assert [float(each) for each in interval.split(" to ")] == pytest.approx([100 * low, 100 * high], abs=1.5)
    assert n == "87 pictures"
    for name, section in (("1 run", first), ("2 other", second.values())):
        accuracy = 100 * np.mean([row["prediction"] == row["label"] for row in section])
        assert table[name][3].startswith(f"{accuracy:.1f} % | ")
    assert page.table("option")["data.severity"] == ["4", "5"]
    assert "data.shift" not in page.table("option")
    assert "incomplete" in page.text
    assert {"calibration.png", "gains.png", "1-reliability.png", "2-class_gains.png"} <= {
        file.name for file in (tmp_path / "report" / "plots").iterdir()
    }
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {"run-1", "run-2"} <= set(ids)


@pytest.mark.parametrize(
    ("names", "options", "setup", "why"),
    [
        (NAMES, {}, {"data": "ShapesDataModule"}, "none: another data set"),
        ([*NAMES[:-1], "gnu"], {}, {}, "none: other classes"),
        (NAMES, {"labelled": False}, {}, "none: no labels"),
        (NAMES, {"path": "sketch/{}.png"}, {}, "none: no picture in common"),
    ],
)
def test_runs_that_cannot_be_paired(run, tmp_path, names, options, setup, why):
    other = write_run(tmp_path / "other", make_samples(20, names, **options), names, **setup)
    found = compare([read_run(run), read_run(other)], draw=lambda *_: "")
    assert found.over_first == ["the first run", why]


@pytest.mark.usefixtures("without_plots")
def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path):
    runs = [write_run(tmp_path / parent / "run", make_samples(6, NAMES), NAMES) for parent in ("a", "b")]
    table = report(*runs, to=tmp_path).table("over the first run")
    assert list(table) == [f"{number} {run}" for number, run in enumerate(runs, 1)]
    assert "Nothing: same options" in (tmp_path / "report.html").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<iframe id="phone" style="border:0;width:390px;height:800px" srcdoc="{page}"></iframe>
<p id="found"></p><script>
addEventListener("load", () => {{
  const page = document.getElementById("phone").contentDocument;
  const width = page.documentElement.clientWidth;
  const scrolls = (each) => each && (each.closest(".wide, pre") || each.closest("svg"));
  const wide = [...page.body.querySelectorAll("*")].filter(
    (each) => !scrolls(each.parentElement) && each.getBoundingClientRect().right > width);
  document.getElementById("found").textContent =
    `${{page.documentElement.scrollWidth - width}} too wide: ${{wide.map((each) => each.outerHTML.slice(0, 80))}};`;
}});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_on_a_phone_nothing_is_wider_than_the_window(tmp_path):
    names = ["a_class_of_one_very_long_word_" * 4, *NAMES]
    first, second = (
        write_run(
            tmp_path / f"{name * 30}", make_samples(40, names, seed=seed, skipped=[2], path="x" * 200 + "{}"), names
        )
        for seed, name in enumerate("ab")
    )
    (first / "views").mkdir()
    Image.new("RGB", (900, 60)).save(first / "views" / "3.png")
    source = report(first, second, to=tmp_path).source.replace("<details>", "<details open>")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE.format(page=html.escape(source)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"-?\d+ too wide: .*;", found)[0] == "0 too wide: ;"
