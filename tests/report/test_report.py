"""sim.report: what is kept, gone on with and never reused; what is refused; and that the page is whole in every state."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from quantsim import QuantConfig, QuantSim, ReportError, Rule
from quantsim.report import measure
from quantsim.report.analysis import Analysis
from quantsim.report.measure import fingerprint, take_rows
from quantsim.report.page import page_data
from quantsim.report.walk import Batch
from tests.tiny import LABELS, tiny_batch, tiny_sim

pytest.importorskip("plotly", reason="the extra quantsim[report] is not installed")

BATCHES = [{**tiny_batch(4, 10, seed=seed), "labels": LABELS} for seed in (1, 2)]
NAME = "bert.encoder.layer.1.output.dense.output"


def accuracy(outputs: Sequence[Any], batches: Sequence[Batch]) -> float:
    right = [output["logits"].argmax(-1) == batch["labels"] for output, batch in zip(outputs, batches, strict=True)]
    return torch.cat(right).float().mean().item()


def report(sim: QuantSim, folder: Path, **options: Any) -> Analysis:
    page = sim.report(BATCHES, folder / "report.html", **{"progress": False, "sensitivity_rows": 4, **options})
    assert page == folder / "report.html"
    return Analysis.read(folder / "report.json")


def data_in(page: Path) -> dict[str, Any]:
    text = page.read_text()
    start = text.index('id="data">') + len('id="data">')
    found: dict[str, Any] = json.loads(text[start : text.index("</script>", start)])
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many batches and quantizers are measured from now on."""
    counts = {"batches": 0, "quantizers": 0}
    statistics, sensitivity = measure.activation_statistics, measure.sensitivity

    def count_batches(*args: Any) -> Any:
        counts["batches"] += 1
        return statistics(*args)

    def count_quantizers(*args: Any) -> Iterator[Any]:
        for item in sensitivity(*args):
            counts["quantizers"] += 1
            yield item

    monkeypatch.setattr(measure, "activation_statistics", count_batches)
    monkeypatch.setattr(measure, "sensitivity", count_quantizers)
    return counts


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int = 99, quantizers: int = 999) -> None:
    """What Ctrl-C does, after so many of them."""
    left = {"batches": batches, "quantizers": quantizers}
    statistics, sensitivity = measure.activation_statistics, measure.sensitivity

    def some_batches(*args: Any) -> Any:
        if not left["batches"]:
            raise KeyboardInterrupt
        left["batches"] -= 1
        return statistics(*args)

    def some_quantizers(*args: Any) -> Iterator[Any]:
        for item in sensitivity(*args):
            if not left["quantizers"]:
                raise KeyboardInterrupt
            left["quantizers"] -= 1
            yield item

    monkeypatch.setattr(measure, "activation_statistics", some_batches)
    monkeypatch.setattr(measure, "sensitivity", some_quantizers)


# ---- what is measured ----


def test_everything_is_measured_and_kept(tmp_path: Path) -> None:
    sim = tiny_sim()
    analysis = report(sim, tmp_path)
    assert analysis.complete
    assert (analysis.seen.rows, analysis.seen.batches, analysis.subject.sensitivity_rows) == (8, 2, 4)
    assert set(analysis.edges) >= set(sim.quantizers)
    assert set(analysis.sensitivity["alone_on"]) == set(analysis.sensitivity["alone_off"]) == set(sim.quantizers)
    assert analysis.scores["off"] == float("inf")
    assert analysis.seen.outputs.db == pytest.approx(analysis.scores["on"], abs=6)
    assert [p.name for p in sim.placements] == [edge.name for edge in analysis.subject.coverage]


def test_a_metric_with_all_rows(tmp_path: Path) -> None:
    sim = tiny_sim()
    analysis = report(sim, tmp_path, metric=accuracy, sensitivity_rows=None)
    assert analysis.subject.sensitivity_rows == 8
    assert analysis.subject.metric == "accuracy"
    with torch.no_grad(), sim.quantizers_off():
        logits = [sim.model(**{k: x for k, x in batch.items() if k != "labels"}).logits for batch in BATCHES]
    assert analysis.scores["off"] == accuracy([{"logits": x} for x in logits], BATCHES)


def test_the_simulation_stays_as_it_is(tmp_path: Path) -> None:
    sim = tiny_sim()
    before = {name: x.clone() for name, x in sim.model.state_dict().items()}
    sim.model.train()
    report(sim, tmp_path)
    assert sim.model.training
    assert all(torch.equal(x, before[name]) for name, x in sim.model.state_dict().items())


def test_rows_are_cut() -> None:
    taken = take_rows(iter(BATCHES), 6)
    assert [len(batch["input_ids"]) for batch in taken] == [4, 2]
    assert torch.equal(taken[1]["labels"], LABELS[:2])
    assert len(take_rows(BATCHES, 4)) == 1


# ---- what is kept ----


def test_a_finished_report_is_not_measured_again(tmp_path: Path, counted: dict[str, int]) -> None:
    sim = tiny_sim()
    first = report(sim, tmp_path)
    assert counted == {"batches": 2, "quantizers": 2 * len(sim.quantizers)}
    assert report(sim, tmp_path) == first
    assert counted == {"batches": 2, "quantizers": 2 * len(sim.quantizers)}


@pytest.mark.parametrize("stop", [{"batches": 0}, {"batches": 1}, {"quantizers": 0}, {"quantizers": 7}, {"quantizers": 90}], ids=str)
def test_an_interrupted_report_goes_on_and_ends_the_same(tmp_path: Path, stop: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    sim = tiny_sim()
    (tmp_path / "whole").mkdir()
    whole = report(sim, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, **stop)
        with pytest.raises(KeyboardInterrupt):
            report(sim, tmp_path)
    kept = Analysis.read(tmp_path / "report.json")
    done = sum(map(len, kept.sensitivity.values()))
    assert not kept.complete
    assert (kept.seen.batches, done) == (min(2, stop.get("batches", 2)), stop.get("quantizers", 0))
    page = data_in(tmp_path / "report.html")
    assert page["subjects"][0]["complete"] is False
    assert page["subjects"][0]["measured"]["alone_on"] == len(kept.sensitivity["alone_on"])

    with monkeypatch.context() as patch:
        interrupt_after(patch, batches=2 - kept.seen.batches, quantizers=2 * len(sim.quantizers) - done)  # and not one more
        again = report(sim, tmp_path)
    assert again.seen == whole.seen
    assert again.sensitivity == whole.sensitivity
    assert again.complete


CHANGES: dict[str, dict[str, Any]] = {"rows": {"rows": 5}, "sensitivity rows": {"sensitivity_rows": 3}, "metric": {"metric": accuracy}}


@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_other_settings_are_measured_anew(tmp_path: Path, options: dict[str, Any], counted: dict[str, int]) -> None:
    sim = tiny_sim()
    report(sim, tmp_path)
    report(sim, tmp_path, **options)
    assert counted["quantizers"] == 4 * len(sim.quantizers)


def test_the_fingerprint_sees_every_weight_range_state_and_batch() -> None:
    sim = tiny_sim()
    keys = {fingerprint(sim, BATCHES, {})}
    assert fingerprint(sim, BATCHES, {}) in keys
    with torch.no_grad():
        sim.model.classifier.bias[1] += 1e-3
    keys.add(fingerprint(sim, BATCHES, {}))
    quantizer = sim.quantizers[NAME]
    quantizer.set_range(quantizer.min * 1.001, quantizer.max)
    keys.add(fingerprint(sim, BATCHES, {}))
    sim.freeze_ranges()
    keys.add(fingerprint(sim, BATCHES, {}))
    other = [BATCHES[0], {**BATCHES[1], "labels": 1 - LABELS}]
    keys.add(fingerprint(sim, other, {}))
    keys.add(fingerprint(sim, BATCHES[:1], {}))
    assert len(keys) == 6


def test_a_closure_is_like_no_other(tmp_path: Path, counted: dict[str, int]) -> None:
    sim, threshold = tiny_sim(), 0.5

    def closure(outputs: Sequence[Any], batches: Sequence[Batch]) -> float:
        return accuracy(outputs, batches) + threshold

    for _ in range(2):
        report(sim, tmp_path, metric=closure)
    assert counted["quantizers"] == 4 * len(sim.quantizers)


def test_a_finished_report_takes_another_title(tmp_path: Path, counted: dict[str, int]) -> None:
    sim = tiny_sim()
    report(sim, tmp_path, title="one")
    report(sim, tmp_path, title="two")
    assert data_in(tmp_path / "report.html")["subjects"][0]["title"] == "two"
    assert counted["batches"] == 2


def test_a_damaged_file_of_results_is_measured_anew(tmp_path: Path) -> None:
    sim = tiny_sim()
    first = report(sim, tmp_path)
    path = tmp_path / "report.json"
    path.write_text(path.read_text().replace('"rows":8', '"rows":9'))
    with pytest.raises(ReportError, match="do not match its own sha256"):
        Analysis.read(path)
    assert report(sim, tmp_path).seen == first.seen


# ---- before and after ----


def test_two_simulations_side_by_side(tmp_path: Path) -> None:
    coarse = tiny_sim(config=QuantConfig.preset("aimet").with_rules(Rule(module=NAME, set={"bits": 2})))
    report(tiny_sim(), tmp_path, before=coarse)
    earlier = Analysis.read(tmp_path / "report.before.json")
    assert earlier.complete
    edge = next(e for e in data_in(tmp_path / "report.html")["edges"] if e["name"] == NAME)
    assert edge["sides"][1]["own"] < 15 < edge["sides"][0]["own"]
    assert edge["sides"][1]["own"] == pytest.approx(earlier.edges[NAME].own.db, rel=1e-4)


def test_beside_an_earlier_report_of_the_same_name(tmp_path: Path) -> None:
    sim = tiny_sim()
    report(sim, tmp_path)
    old = sim.quantizers[NAME].max.item()
    sim.quantizers[NAME].set_range(sim.quantizers[NAME].min / 4, sim.quantizers[NAME].max / 4)
    report(sim, tmp_path, before=tmp_path / "report.json")
    edge = next(e for e in data_in(tmp_path / "report.html")["edges"] if e["name"] == NAME)
    assert edge["sides"][1]["grid"][1] == pytest.approx(old, rel=0.02)
    assert edge["sides"][0]["grid"][1] == pytest.approx(old / 4, rel=0.02)
    assert edge["sides"][0]["clipped"] > edge["sides"][1]["clipped"]


def test_scores_by_another_metric_are_not_put_beside(tmp_path: Path) -> None:
    sim = tiny_sim()
    report(sim, tmp_path)
    report(sim, tmp_path, before=tmp_path / "report.json", metric=accuracy)
    edge = next(e for e in data_in(tmp_path / "report.html")["edges"] if e["name"] == NAME)
    assert [side["on"] is None for side in edge["sides"]] == [False, True]


# ---- the page ----


def test_the_page_holds_all_edges_and_fetches_nothing(tmp_path: Path) -> None:
    sim = tiny_sim()
    report(sim, tmp_path, title="</script><b>& co")
    text = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in text
    own = text.replace(text[text.index("/**\n* plotly.js") : text.index('<script type="application/json"')], "")
    assert "http://" not in own
    assert "https://" not in own
    assert "<title>&lt;/script&gt;&lt;b&gt;&amp; co" in text
    page = data_in(tmp_path / "report.html")
    assert page["subjects"][0]["title"] == "</script><b>& co"
    assert {e["name"] for e in page["edges"]} == {p.name for p in sim.placements}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_figures_of_the_page_are_those_that_were_measured(tmp_path: Path) -> None:
    analysis = report(tiny_sim(), tmp_path)
    for edge in page_data(analysis, None)["edges"]:
        side, s = edge["sides"][0], analysis.edges.get(edge["name"])
        if s is None:
            assert side is None
            continue
        assert side["high"] == pytest.approx(s.high, rel=1e-4)
        assert sum(side["histogram"]["counts"]) == s.values
        score = analysis.sensitivity["alone_on"].get(edge["name"])
        assert score is None if side["on"] is None else float(side["on"]) == pytest.approx(score, rel=1e-5)
        assert side["clipped"] == (None if s.grid is None else s.clipped)


@pytest.mark.parametrize("options", [{"sensitivity": False}, {"rows": 1}], ids=str)
def test_less_can_be_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    analysis = report(tiny_sim(), tmp_path, **options)
    assert bool(analysis.sensitivity["alone_on"]) == ("sensitivity" not in options)
    assert analysis.complete


def test_before_calibration_the_page_shows_values_alone(tmp_path: Path) -> None:
    analysis = report(tiny_sim(calibrated=False), tmp_path)
    assert analysis.complete
    assert analysis.sensitivity == {"alone_on": {}, "alone_off": {}}
    edge = next(e for e in data_in(tmp_path / "report.html")["edges"] if e["name"] == NAME)
    assert edge["sides"][0]["own"] is None
    assert edge["sides"][0]["histogram"]


def test_progress_says_how_long_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sim = tiny_sim()
    report(sim, tmp_path, progress=True)
    said = capsys.readouterr().err
    assert f"sensitivity of {len(sim.quantizers)} quantizers on 4 rows: about " in said
    assert "each alone on: 100%" in said


@pytest.mark.slow
def test_a_page_of_bert_base_stays_below_ten_megabytes(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
    sim = QuantSim(model, in_place=True)
    batch = {"input_ids": torch.randint(0, 30522, (2, 32))}
    sim.compute_encodings([batch])
    first = sim.report([batch], tmp_path / "first.html", sensitivity=False, progress=False)
    both = sim.report([batch], tmp_path / "both.html", before=tmp_path / "first.json", sensitivity=False, progress=False)
    assert first.stat().st_size < 8e6
    assert both.stat().st_size < 10e6


# ---- refusals ----


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([torch.zeros(2)], "batch 0 is a Tensor; expected tensors of rows by name"),
        ([{"input_ids": [1, 2]}], r"batch 0 is \{input_ids: list\}"),
        ([{"words": torch.ones(2, 3)}], "batch 0 holds words; the model also needs input_ids"),
        ([tiny_batch(), {"input_ids": torch.ones(0, 3)}], "batch 1 is empty"),
    ],
    ids=["none", "no mapping", "no tensor", "other names", "empty"],
)
def test_batches_that_are_none(batches: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=message):
        tiny_sim().report(batches, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = tiny_sim()
    with pytest.raises(ReportError, match=r"nowhere.json: cannot be read"):
        sim.report(BATCHES, tmp_path / "a.html", before=tmp_path / "nowhere.json")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ReportError, match="expected an object with format, sha256 and analysis"):
        sim.report(BATCHES, tmp_path / "a.html", before=str(tmp_path / "b.json"))
    with pytest.raises(ReportError, match=r"expected the name of the page"):
        sim.report(BATCHES, tmp_path)
    with pytest.raises(ReportError, match="rows is 0; expected 1 or more"):
        sim.report(BATCHES, tmp_path / "a.html", rows=0)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'quantsim\[report\]'"):
        sim.report(BATCHES, tmp_path / "a.html")
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
