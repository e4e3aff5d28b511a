import base64
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from capsexp.compare import report
from capsexp.compare.chart import Axis, chart
from capsexp.compare.comparison import compare
from capsexp.compare.curves import COLOURS, Curve, Point
from capsexp.compare.find import find_all
from capsexp.compare.runs import read_all
from capsexp.compare.templates import render
from capsexp.errors import Notes

TAGS = ("validation/accuracy", "train/loss")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
EVIL = "<script>alert('x')</script>\" onload=\"x"


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def runs(write_run, tmp_path, notes):
    """Accuracies 0.9, 0.1 and 1 (sorted as text, 1.0 is not the largest), and a run without any."""
    for name, iterations, accuracy in (("a", 9, 0.9), ("b", 10, 0.1), ("c", 100, 1.0)):
        write_run(name, {"routing.iterations": iterations}, validation=[0.05, accuracy], test=accuracy)
    write_run("d", {"routing.iterations": 1, "seed": 1}, status="failed", error="X: no <way>")
    return read_all(find_all([tmp_path], notes), notes)


@pytest.fixture
def page(tmp_path, notes):
    """Write the page of some runs; return its HTML."""

    def write(runs, tags=TAGS, **options):
        report.write(tmp_path / "page.html", compare(runs, notes, **options), tags, notes)
        return (tmp_path / "page.html").read_text()

    return write


class Reader(HTMLParser):
    """Collect the elements and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def with_figure(run, size=(20, 10)):
    (run.path / "figures").mkdir()
    image = Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0]))
    image.save(run.path / "figures" / "reconstruction.png")
    return (run.path / "figures" / "reconstruction.png").read_bytes()


def test_the_page_is_one_file_that_loads_nothing(runs, page):
    with_figure(runs[0])
    text = page(runs)
    assert "http:" not in text
    assert "https:" not in text
    assert "$" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not {"{{", "{%", "{#"} & {text[i : i + 2] for i in range(len(text))}
    read = Reader(text)
    assert read.open == []
    assert {tag for tag, _ in read.tags}.isdisjoint({"link", "iframe", "object", "base"})
    links = [
        value
        for _, attributes in read.tags
        for key, value in attributes.items()
        if key in ("src", "href", "action")
    ]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in read.tags
    (policy,) = [attributes["content"] for _, attributes in read.tags if attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none';")


def test_every_run_is_shown_with_its_settings_error_command_and_figures(runs, page):
    content = with_figure(runs[3])
    (runs[3].path / "command.txt").write_text("capsexp train 'a=b c' seed=1\n")
    runs = read_all([run.path for run in runs], Notes())
    read = Reader(page(runs))
    for line in ("X: no <way>", "capsexp train 'a=b c' seed=1", "seed=1", "optimizer.lr.start=0.001"):
        assert line in read.texts
    assert "model.routing.iterations=1" not in read.texts
    (image,) = [attributes for tag, attributes in read.tags if tag == "img"]
    assert base64.b64decode(image["src"].partition(",")[2]) == content
    assert (image["alt"], image["class"]) == ("reconstruction", "small")
    assert (
        len(
            [
                tag
                for tag, attributes in read.tags
                if tag == "details" and attributes.get("class") == "run sheet"
            ]
        )
        == 4
    )


def test_nothing_from_files_becomes_markup(write_run, page, notes, tmp_path):
    settings = {"loss.name": EVIL, "seed": 1}
    path = write_run(
        "evil<b>", settings, validation=[0.5], status="failed", error=EVIL, choices={"model": EVIL}
    )
    (path / "command.txt").write_text(EVIL)
    other = write_run("other", validation=[0.5], choices={"model": "<i>"})
    (path / "figures").mkdir()
    (path / "figures" / '"><script>.png').write_bytes(report.PNG)
    text = page(read_all([path, other], notes), tags=("validation/accuracy",), show=["train/loss"])
    read = Reader(text)
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    assert {"b", "i"}.isdisjoint(tag for tag, _ in read.tags)
    assert read.texts.count(EVIL) >= 2
    assert '"><script>' in [attributes.get("alt") for _, attributes in read.tags]


def test_files_that_are_not_png_are_left_out_with_a_warning(runs, page, notes):
    (runs[0].path / "figures").mkdir()
    (runs[0].path / "figures" / "a.png").write_text("no")
    (runs[0].path / "figures" / "b.png").mkdir()
    assert "<img" not in page(runs)
    warnings = [f"{runs[0].path}/figures/{name}.png is not shown: not a PNG file" for name in "ab"]
    assert notes.warnings == warnings


def test_a_large_figure_is_not_enlarged(runs, page):
    with_figure(runs[0], size=(500, 10))
    (image,) = [attributes for tag, attributes in Reader(page(runs)).tags if tag == "img"]
    assert "class" not in image


def test_runs_without_curves_or_config_are_shown(write_run, page, notes):
    path = write_run("bare", config={})
    (path / "metrics.jsonl").unlink()
    (path / "status.json").write_text("{")
    text = page(read_all([path], notes))
    assert "<svg" not in text
    assert "The settings cannot be read." in text
    assert "1 run in " in text


def test_the_page_is_written_atomically(runs, page, tmp_path, monkeypatch, notes):
    before = page(runs)
    monkeypatch.setattr(report, "chart", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page(runs)
    assert (tmp_path / "page.html").read_text() == before
    assert not list(tmp_path.glob("*.tmp"))


# The curves


def curve(*values, label="x=1"):
    return Curve(label, (), {"t": [Point(float(step), value, sd) for step, (value, sd) in enumerate(values)]})


def test_a_curve_follows_its_values():
    tree = ElementTree.fromstring(chart([curve((0.0, 0.0), (1.0, 0.5), (0.0, 0.0), label="<x>")], "t"))
    (drawn,) = [group for group in tree.iter("g") if group.get("class") == "curve"]
    assert drawn.find("title").text == "1: <x>; 0 at step 2, 0 run(s)"
    kinds = {path.get("class"): path.get("d") for path in drawn.iter("path")}
    assert set(kinds) == {"band", "line", "reach"}
    points = [tuple(map(float, pair.split(","))) for pair in kinds["line"][1:].split("L")]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] == points[2][1] > points[1][1]
    assert kinds["band"].endswith("Z")


def test_curves_without_spread_change_or_values_can_be_drawn():
    text = chart([curve((0.5, 0.0)), curve(label="none")], "t")
    assert text.count('class="curve"') == 1
    assert 'class="band"' not in text
    assert "nan" not in text


def test_curves_beyond_the_palette_are_marked():
    text = chart([curve((0.0, 0.1), (number / 10, 0.1)) for number in range(len(COLOURS) + 2)], "t")
    assert text.count('class="curve other"') == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1000), (0.9871, 0.9874), (-3, 17_000), (1e-6, 2e-6)])
def test_ticks_are_few_round_and_in_range(low, high):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 4 <= len(ticks) <= 10
    assert low <= ticks[0] < ticks[-1] <= high
    assert all(len(f"{tick:g}") <= 8 for tick in ticks)


def test_templates_escape_values():
    curve = {"number": 1, "colour": '"', "is_other": False, "title": "<br>", "line": "", "band": None}
    axes = {"width": 1, "height": 1, "left": 1, "right": 1, "bottom": 1, "x_ticks": [], "y_ticks": []}
    text = render("chart.svg", tag='"<', count=1, curves=[curve], **axes)
    assert 'aria-label="&#34;&lt; by step' in text
    assert "--curve: &#34;" in text
    assert "<title>&lt;br&gt;</title>" in text


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'width' is undefined"):
        render("chart.svg")


# In a browser


@pytest.fixture
def browse(tmp_path):
    """Open a page; return its HTML after its scripts have run."""
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome")

    def open_page(text):
        (tmp_path / "probe.html").write_text(text)
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
        window = (f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000")
        command = [BROWSER, *options, *window, f"file://{tmp_path}/probe.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return open_page


def with_script(text, script):
    return text.replace("</body>", f"<script>{script}</script></body>")


def framed(text, width, height):
    """Put the page into a frame of this size: a headless browser has no window as narrow as a phone."""
    style = f"width:{width}px;height:{height}px;border:0"
    return f'<body><iframe style="{style}" srcdoc="{html.escape(text)}"></iframe>'


def column(dumped, index):
    body = re.search(r"<tbody>(.*)</tbody>", dumped, re.DOTALL)[1]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    return [re.sub(r"<.*?>", "", re.findall(r"<td.*?</td>", row, re.DOTALL)[index]) for row in rows]


CLICK = """
const head = name => [...document.querySelectorAll("th button")].find(button => button.title === name);
const record = () => (document.body.dataset.sorts = (document.body.dataset.sorts || "") +
  [...document.querySelectorAll("tbody tr")].map(row => row.lastElementChild.textContent).join("") + " ");
record();
for (const name of ["test/accuracy", "test/accuracy", "routing.iterations", "run"]) {
  head(name).click();
  record();
}
head("routing.iterations").focus();
document.activeElement.click();
const line = document.querySelector(".curve .line");
document.body.dataset.length = line.getTotalLength();
document.body.dataset.colour = getComputedStyle(line).stroke;
"""


def test_a_click_sorts_rows_and_curves_are_drawn(runs, page, browse):
    dumped = browse(with_script(page(runs), CLICK))
    # As written, then by test (best first, worst first), by iterations, by name. d has no metrics.
    assert re.search(r'data-sorts="(.*?) "', dumped)[1].split() == ["cabd", "cabd", "bacd", "dabc", "abcd"]
    assert column(dumped, 1) == ["1", "9", "10", "100"]
    heads = re.findall(r"<th .*?</th>", dumped)
    assert ["ascending" in head for head in heads if "aria-sort" in head] == [True]
    assert 'aria-sort="ascending"' in next(head for head in heads if "iterations" in head)
    assert float(re.search(r'data-length="(.*?)"', dumped)[1]) > 100
    assert re.search(r'data-colour="(.*?)"', dumped)[1] not in ("none", "")
    titles = re.findall(r'<g class="curve".*?<title>(.*?)</title>', dumped)
    assert any(title.startswith("1: iterations=100") for title in titles)


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_never_scrolls_sideways(width, height, runs, write_run, page, browse, notes):
    long = write_run("e" * 120, {"loss.name": "x" * 300}, validation=[0.5], status="failed", error="y" * 500)
    (long / "command.txt").write_text("z" * 500)
    with_figure(runs[0], size=(3000, 10))
    runs = read_all([*(run.path for run in runs), long], notes)
    measure = """
    for (const details of document.querySelectorAll("details")) details.open = true;
    const box = document.querySelector(".box");
    const page = document.documentElement;
    parent.document.body.dataset.widths = [page.scrollWidth, innerWidth, box.scrollWidth, box.clientWidth];
    """
    dumped = browse(framed(with_script(page(runs), measure), width, height))
    content, window, table, box = map(int, re.search(r'data-widths="(.*?)"', dumped)[1].split(","))
    assert window == width
    assert content <= window
    assert table > box


def test_a_link_opens_the_run(runs, page, browse):
    text = page(runs).replace(' open=""', "")
    dumped = browse(with_script(text, 'document.querySelector("tbody a").click();'))
    opened = re.findall(r'<details class="run sheet" open="">', dumped)
    assert len(opened) == 1


def test_a_published_error_is_sorted_as_a_number(write_run, page, notes, tmp_path):
    write_run("a", {"paper": {"error": 9.7, "sd": None}}, test=0.9)
    write_run("b", {"paper": {"error": 10, "sd": 0.5}}, test=0.8)
    text = page(read_all(find_all([tmp_path], notes), notes))
    assert '<td class="number" data-value="9.7" data-kind="number">9.7</td>' in text
    assert '<td class="number" data-value="10.0" data-kind="number">10 ± 0.5</td>' in text
