"""The page in Chromium: it opens without network, its table sorts and filters, and a click anywhere shows the edge."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantsim import QuantConfig, Rule
from quantsim.report.analysis import Analysis
from tests.tiny import LABELS, tiny_batch, tiny_sim

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly", reason="the extra quantsim[report] is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt install chromium)"),
]

BATCHES = [{**tiny_batch(4, 10, seed=seed), "labels": LABELS} for seed in (1, 2)]
CULPRIT = "bert.encoder.layer.1.output.dense.output"
TITLE = 'A tiny BERT & "<b>two bits</b>"'


class Opened:
    """A page in the browser, and all that it asked for and complained of."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.body.dataset.ready === 'yes'")

    def names(self) -> list[str]:
        """The table's first column, as it is shown."""
        found: list[str] = self.page.locator("#table tbody td:first-child").all_text_contents()
        return found

    def column(self, label: str) -> list[str]:
        headings = self.page.locator("#table thead th").evaluate_all("cells => cells.map(c => c.firstChild.textContent)")
        at = headings.index(label) + 1
        found: list[str] = self.page.locator(f"#table tbody td:nth-child({at})").all_text_contents()
        return found

    def sort(self, label: str) -> None:
        self.page.locator("#table thead th", has_text=label).first.click()

    def shown_edge(self) -> str:
        text: str = self.page.locator("#detail-name").text_content()
        return text

    def plotted(self, plot: str) -> list[dict[str, Any]]:
        """The traces of a plot."""
        script = f"document.getElementById('{plot}').data.map(t => ({{name: t.name, y: [...t.y]}}))"
        found: list[dict[str, Any]] = self.page.evaluate(script)
        return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        one = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a model with one quantizer of two bits, and one of it beside the model without."""
    path = tmp_path_factory.mktemp("reports")
    coarse = tiny_sim(config=QuantConfig.preset("aimet").with_rules(Rule(module=CULPRIT, set={"bits": 2})))
    coarse.report(BATCHES, path / "coarse.html", title=TITLE, progress=False)
    tiny_sim().report(BATCHES, path / "both.html", before=path / "coarse.json", progress=False)
    return path


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Opened]:
    one = Opened(browser, folder / "coarse.html")
    yield one
    assert not one.complaints
    assert all(url.startswith(("file:", "data:", "blob:")) for url in one.asked)
    one.page.close()


def test_title_and_summary(opened: Opened, folder: Path) -> None:
    assert opened.page.locator("h1").text_content() == TITLE
    assert "BertForSequenceClassification · preset aimet · 8 rows seen" in opened.page.locator("#facts").text_content()
    assert opened.page.locator("#unfinished").is_hidden()
    lists = opened.page.locator("#lists > div")
    assert lists.nth(0).locator("li span").first.text_content() == CULPRIT
    assert lists.nth(2).locator("li span").first.text_content() == CULPRIT
    analysis = Analysis.read(folder / "coarse.json")
    assert opened.page.locator(".tile b").first.text_content() == f"{analysis.seen.outputs.db:.1f}".replace("-", "−")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1400
    assert len(opened.names()) == len({edge.name for edge in analysis.subject.coverage})


def test_the_table_sorts_by_numbers_with_empty_cells_last(opened: Opened) -> None:
    opened.sort("own SQNR")
    assert opened.names()[0] == CULPRIT
    for _ in range(2):
        column = opened.column("own SQNR")
        figures = [float(text.replace("−", "-").replace("∞", "inf")) for text in column if text]
        assert column[: len(figures)] == [text for text in column if text]
        ascending = opened.page.locator("#table th[aria-sort]").get_attribute("aria-sort") == "ascending"
        assert figures == sorted(figures, reverse=not ascending)
        opened.sort("own SQNR")


def test_the_table_filters(opened: Opened) -> None:
    everything = opened.names()
    opened.page.fill("#search", "layer.1 output.dense")
    assert opened.names() == [name for name in everything if "layer.1" in name and "output.dense" in name]
    assert opened.page.locator("#shown").text_content() == f"{len(opened.names())} of {len(everything)} edges"
    opened.page.fill("#search", "")
    opened.page.select_option("#role", "weight")
    assert opened.names() == [name for name in everything if name.endswith(".weight")]
    opened.page.select_option("#role", "")
    opened.page.select_option("#op", "softmax")
    assert opened.names() == [name for name in everything if name.endswith("softmax")]
    opened.page.select_option("#op", "")
    opened.page.select_option("#kind", "float")
    assert 0 < len(opened.names()) < len(everything)
    assert set(opened.column("quantizer")) == {"floating point"}


def test_a_row_shows_its_histogram(opened: Opened, folder: Path) -> None:
    s = Analysis.read(folder / "coarse.json").edges[CULPRIT]
    assert s.histogram is not None
    assert s.grid is not None
    opened.page.fill("#search", "pooler.dense.output")
    opened.page.locator("#table tbody tr").click()
    assert opened.shown_edge() == "bert.pooler.dense.output"
    opened.page.fill("#search", CULPRIT)
    opened.page.locator("#table tbody tr").click()
    assert opened.shown_edge() == CULPRIT
    counts = [sum(counts) for counts in zip(*(trace["y"] for trace in opened.plotted("histogram")), strict=True)]
    full = [i for i, count in enumerate(s.histogram.counts) if count]
    assert counts == list(s.histogram.counts[full[0] : full[-1] + 1])
    lines = opened.page.evaluate("document.getElementById('histogram').layout.shapes.map(s => s.x0)")
    assert lines == pytest.approx(list(s.grid), rel=1e-6)
    assert opened.plotted("channels")[0]["y"] == pytest.approx(list(s.channels), rel=5e-3)


def test_a_bar_and_a_list_lead_to_the_edge(opened: Opened) -> None:
    opened.page.locator("#lists > div").nth(3).locator("li").nth(1).click()
    listed = opened.page.locator("#lists > div").nth(3).locator("li").nth(1).locator("span").first.text_content()
    assert opened.shown_edge() == listed
    opened.page.locator("#alone-on").scroll_into_view_if_needed()
    box = opened.page.locator("#alone-on .bars .point path").last.bounding_box()  # the most sensitive is on top
    opened.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.page.wait_for_function(f"document.getElementById('detail-name').textContent === '{CULPRIT}'")
    assert opened.page.locator("#table tr.selected td").first.text_content() == CULPRIT


def test_other_channels_can_be_looked_at(opened: Opened) -> None:
    options = opened.page.locator("#family option").all_text_contents()
    assert len(options) > 2
    for i, option in enumerate(options):
        opened.page.select_option("#family", index=i)
        edges = int(option.split("(")[1].split()[0])
        assert opened.page.evaluate("document.querySelector('#heat .plot').data[0].z.length") == edges


def test_before_and_after(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder / "both.html")
    assert TITLE in opened.page.locator(".before").first.text_content()
    opened.page.fill("#search", CULPRIT)
    opened.page.locator("#table tbody tr").click()
    old, new = (Analysis.read(folder / f"{name}.json").edges[CULPRIT] for name in ("coarse", "both"))
    headings = opened.page.locator("#table thead th").all_text_contents()
    cells = opened.page.locator("#table tbody td").all_text_contents()
    shown = dict(zip(headings, cells, strict=True))
    assert old.own is not None
    assert new.own is not None
    assert shown["own SQNRbefore, dB"] == f"{old.own.db:.1f}"
    assert shown["own SQNRafter, dB"] == f"{new.own.db:.1f}"
    assert {trace["name"].split(",")[0] for trace in opened.plotted("histogram")} == {"before", "after"}
    assert {trace["name"] for trace in opened.plotted("noise-plot")} == {"total, after", "own, after", "total, before", "own, before"}
    assert opened.page.locator("#heat .plot").count() == 2
    assert not opened.complaints
    opened.page.close()


def test_a_screenshot_has_every_plot_drawn(opened: Opened, tmp_path: Path) -> None:
    for plot in ("histogram", "channels", "noise-plot", "alone-on", "alone-off"):
        box = opened.page.locator(f"#{plot} .plot-container").bounding_box()
        assert box["width"] > 500
        assert box["height"] > 250
        assert opened.page.locator(f"#{plot} .point, #{plot} .points path").count() > 2
    path = tmp_path / "page.png"
    opened.page.screenshot(path=path, full_page=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 100_000  # a blank page of this size has some 20 kB


@pytest.mark.slow
def test_the_bundled_checkpoint(browser: Any, tmp_path: Path) -> None:
    artifacts, data, tasks = (pytest.importorskip(f"recipes.{name}") for name in ("artifacts", "data", "tasks"))
    task = tasks.task_of("bert_w8a8_rte")
    artifact = artifacts.resolve("bert_w8a8_rte", None, task)
    sim = artifact.load_simulation()
    rows, _ = data.load_sample(task)
    encoded = data.encode(rows.select(range(8)), task, artifact.tokenizer(sim.model.config.vocab_size), artifact.max_length)
    page = sim.report([encoded[:4], encoded[4:]], tmp_path / "rte.html", title="bert_w8a8_rte", sensitivity_rows=2, progress=False)
    assert page.stat().st_size < 8e6
    analysis = Analysis.read(tmp_path / "rte.json")
    opened = Opened(browser, page)
    assert "bert_w8a8_rte" in opened.page.locator("h1").text_content()
    opened.sort("own SQNR")
    worst = opened.names()[0]
    noise = {name: s.own.db for name, s in analysis.edges.items() if s.own}
    assert noise[worst] == min(noise.values())
    opened.page.locator("#table tbody tr").first.click()
    assert opened.shown_edge() == worst
    opened.page.fill("#search", "layer.5 dense")
    assert opened.names()
    assert all("layer.5" in name and "dense" in name for name in opened.names())
    shot = tmp_path / "rte.png"
    opened.page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 150_000
    assert not opened.complaints
    assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.asked)
    opened.page.close()
