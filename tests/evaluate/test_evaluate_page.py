"""The run's page: what it shows, that it needs nothing, and that what models write stays text."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest_shop import HOSTILE, shop_report, shop_run
from conftest_sums import hand_made

from posttrain import evaluate
from posttrain.core import EvalReport
from posttrain.evaluate.line_chart import draw_curve, format_number, format_tick, nice_ticks, smooth_values
from posttrain.evaluate.lineage_drawing import draw_lineage
from posttrain.evaluate.page import visible
from posttrain.registry import Lineage, LineageEdge, LineageNode

VOID = {"meta", "link", "br", "hr", "img", "input", "base"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> evaluate.RunReport:
    return shop_run(tmp_path_factory.mktemp("shop"), hostile=True)


@pytest.fixture(scope="module")
def html(report: evaluate.RunReport) -> str:
    return evaluate.report_html(report)


def test_the_page_tells_the_whole_story(report: evaluate.RunReport, html: str) -> None:
    text = Page(html).text()
    accuracy = report.stages[-1].report.metrics["accuracy"]
    assert f"{100 * accuracy.value:.1f} %" in text
    assert f"{100 * accuracy.low:.1f}–{100 * accuracy.high:.1f}" in text
    for words in ("Base", "SFT", "GRPO", "412 k", "1.22 M", "2.7 min", "join", "Entropy", "KL to the reference"):
        assert words in text
    assert "SFT: 2 of 300 answers could not be graded" in text
    assert "champion of shop-sql" in text
    assert "shop-sql/grpo-lr-1e-6" in text
    assert text.count("rolled back") == 2
    assert text.count("refused") >= 1
    assert "its lower bound must be above" in text
    assert "150 of 300 tasks are shown" in text
    assert "GRPO against SFT" in text
    assert "rewards/sql_result/mean" in text


def test_the_page_is_well_formed_and_needs_no_network(html: str) -> None:
    page = Page(html)
    assert page.wrong == []
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src"):
                assert (value or "").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "http" not in style
    assert "@import" not in style
    assert re.findall(r"url\((?!#)", html) == []


def test_only_the_pages_own_script_may_run(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    script = html[html.rindex("<script>") + len("<script>") : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_text_stays_text(html: str) -> None:
    assert HOSTILE not in html
    assert '<script>alert("x")' not in html
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    text = Page(html).text()
    assert '<script>alert("x")</script><img src=x onerror=alert(1)>⟨202e⟩esrever⟨001b⟩' in text


def test_unseen_and_long_text() -> None:
    assert visible("a\x00b\r\n\tc\ud800\u200b") == "a⟨0000⟩b⟨000d⟩\n\tc⟨d800⟩⟨200b⟩"
    assert visible("x" * 100, 10) == "x" * 10 + "\n… 90 more characters"
    broken = hand_made([1]).replace(suite="\ud800" * 3)
    page = evaluate.report_html(
        evaluate.RunReport(title="t", stages=(evaluate.Stage(name="\ud800", report=broken),), tasks=())
    )
    page.encode()


def test_the_filter_knows_every_verdict(report: evaluate.RunReport, html: str) -> None:
    shown = [a["data-verdicts"] or "" for tag, a in Page(html).tags if a.get("class") == "task"]
    buttons = [a["data-show"] for tag, a in Page(html).tags if "data-show" in a]
    assert len(shown) == len(report.tasks) == 150
    assert set(" ".join(shown).split()) == set(buttons) - {"all"}
    last = report.stages[-1].report
    wrong = sum(not evaluate.is_right(sample) for sample in last.samples)
    assert sum("wrong" in verdicts.split() for verdicts in shown) == min(wrong, 75)


def test_tasks_are_shown_with_every_models_answer() -> None:
    before, after = hand_made([0, 1, None, 1], "a"), hand_made([1, 0, 1, 1], "b")
    tasks = evaluate.shown_tasks([("old", before), ("new", after)])
    assert [task.verdicts() for task in tasks] == [
        ("right", "gained"),
        ("wrong", "lost"),
        ("right", "gained"),
        ("right",),
    ]
    assert [answer.label for answer in tasks[0].answers] == ["old", "new"]
    assert [task.verdicts()[0] for task in evaluate.shown_tasks([("old", before)])] == [
        "wrong",
        "right",
        "failed",
        "right",
    ]
    few = evaluate.shown_tasks([("m", hand_made([1] * 90 + [0] * 10))], limit=20)
    assert [task.verdicts() for task in few].count(("wrong",)) == 10
    assert len(few) == 20
    many = evaluate.shown_tasks([("m", hand_made([1] * 5 + [0] * 95))], limit=20)
    assert [task.verdicts() for task in many].count(("right",)) == 5


def test_an_empty_report_and_a_single_stage_are_pages_too(tmp_path: Path) -> None:
    empty = Page(evaluate.report_html(evaluate.RunReport(title="Nothing yet")))
    assert empty.wrong == []
    assert "Nothing yet" in empty.text()
    one = evaluate.RunReport(
        title="One", stages=(evaluate.Stage(name="base", report=hand_made([[1, 0], [0, 0], [1, 1]])),)
    )
    evaluate.report_html(one, tmp_path / "sub" / "report.html")
    text = Page((tmp_path / "sub" / "report.html").read_text(encoding="utf-8")).text()
    assert "pass@2 66.7 %" in text


def test_json_comes_back(tmp_path: Path, report: evaluate.RunReport) -> None:
    scores = shop_report("m", 1.0, seed=0, n=20)
    evaluate.report_json(scores, tmp_path / "eval.json")
    assert EvalReport.from_json((tmp_path / "eval.json").read_bytes()) == scores
    evaluate.report_json(report, tmp_path / "run.json")
    assert evaluate.RunReport.from_json((tmp_path / "run.json").read_bytes()) == report


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.31, 0.93, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 8.0, [-5, 0, 5, 10]),
        (0.0, 7e-5, [0, 2e-5, 4e-5, 6e-5, 8e-5]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, marks: list[float]) -> None:
    found, step = nice_ticks(low, high)
    assert found == pytest.approx(marks)
    assert found[0] <= low
    assert found[-1] >= high
    assert len({format_tick(mark, step) for mark in found}) == len(found)


def test_a_chart_puts_values_where_they_belong() -> None:
    chart = draw_curve(
        evaluate.Curve(title="c", series={"a": ((0, 0.0), (50, math.nan), (100, 1.0)), "b": ((50, 0.5),)})
    )
    assert chart is not None
    assert chart.y_ticks[0].at == pytest.approx(chart.bottom)
    assert chart.y_ticks[-1].at == pytest.approx(chart.top)
    assert chart.lines[0].raw == f"M{chart.left:.1f} {chart.bottom:.1f}L{chart.right:.1f} {chart.top:.1f}"
    assert [hover.text for hover in chart.hovers] == ["step 0: a 0", "step 50: b 0.5", "step 100: a 1"]
    middle = chart.hovers[1].dots[0]
    assert middle.y == pytest.approx((chart.top + chart.bottom) / 2)
    assert sum(hover.width for hover in chart.hovers) == pytest.approx(chart.right - chart.left)
    assert draw_curve(evaluate.Curve(title="c", series={"a": ((0, math.nan),)})) is None
    assert draw_curve(evaluate.Curve(title="c", series={"a": ((3, 7.0),)})) is not None


def test_long_series_are_averaged_and_smoothed() -> None:
    points = tuple((float(step), float(step % 2)) for step in range(1, 10_001))
    chart = draw_curve(evaluate.Curve(title="c", series={"a": points}))
    assert chart is not None
    assert chart.lines[0].raw.count("L") < 240
    assert len(chart.hovers) <= 80
    assert chart.hovers[-1].text.startswith("step 10 k")
    assert smooth_values([1.0] * 60) == pytest.approx([1.0] * 60)
    assert smooth_values([0.0, 1.0] * 45)[45] == pytest.approx(0.5, abs=0.1)
    assert smooth_values([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (123.456, "123.5"),
        (200.0, "200"),
        (12_345.0, "12.3 k"),
        (1.22e6, "1.22 M"),
        (7e-5, "7e−5"),
        (-0.004, "−0.004"),
        (math.inf, "–"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert format_number(value) == text


def test_known_metrics_find_their_chart_also_behind_a_stage() -> None:
    rows = [
        {"step": 1.0, "sft/loss": 2.0, "sft/entropy": 1.0, "sft/odd": 1.0},
        {"step": 1.0, "grpo/reward": 0.1, "grpo/eval/accuracy": 0.2, "grpo/completions/mean_length": 9.0},
        {"step": 2.0, "grpo/reward": 0.3, "eval/nll": 1.0, "entropy": 0.5},
    ]
    from posttrain.evaluate.run_report import _charts

    known, rest = _charts(rows)
    assert list(known.items()) == [
        ("sft · Loss", ["sft/loss"]),
        ("sft · Entropy", ["sft/entropy"]),
        ("grpo · Reward", ["grpo/reward"]),
        ("grpo · Accuracy", ["grpo/eval/accuracy"]),
        ("grpo · Completion length (tokens)", ["grpo/completions/mean_length"]),
        ("Held-out loss (per token)", ["eval/nll"]),
        ("Entropy", ["entropy"]),
    ]
    assert rest == {"sft/odd": ["sft/odd"]}
    curves = evaluate.curves_from_metrics(rows, known)
    assert curves[2].series == {"grpo/reward": ((1.0, 0.1), (2.0, 0.3))}


def _lineage(edges: list[tuple[str, str]]) -> Lineage:
    names = list(dict.fromkeys(name for edge in edges for name in edge))
    return Lineage(
        nodes=tuple(LineageNode(id=name, kind="model", name=name) for name in names),
        edges=tuple(LineageEdge(child=child, parent=parent, relation="made from") for child, parent in edges),
    )


def test_the_lineage_flows_from_left_to_right_without_overlap() -> None:
    edges = [("z", "y"), ("z", "d"), ("y", "x"), ("y", "d"), ("x", "d"), ("x", "e"), ("z", "e")]
    drawing = draw_lineage(_lineage(edges))
    boxes = {box.name: box for box in drawing.boxes}
    assert boxes["z"].is_root
    for child, parent in edges:
        assert boxes[parent].x + drawing.box_width < boxes[child].x
    for one in drawing.boxes:
        assert 0 <= one.y <= drawing.height - drawing.box_height
        assert one.x + drawing.box_width <= drawing.width
        for other in drawing.boxes:
            if one is not other and one.x == other.x:
                assert abs(one.y - other.y) >= drawing.box_height
    assert len(drawing.arrows) == len(edges)


def test_an_arrow_over_several_layers_passes_between_the_boxes() -> None:
    drawing = draw_lineage(_lineage([("c", "b"), ("b", "a"), ("c", "a")]))
    middle = next(box for box in drawing.boxes if box.name == "b")
    around = next(path for path in drawing.arrows if path.count("C") == 2)
    lane = float(re.findall(r"L[\d.]+ ([\d.]+)", around)[0])
    assert not middle.y <= lane <= middle.y + drawing.box_height


def test_a_circle_and_a_lone_artifact_can_be_drawn() -> None:
    assert len(draw_lineage(_lineage([("a", "b"), ("b", "a")])).boxes) == 2
    alone = Lineage(nodes=(LineageNode(id="a", kind="dataset", name="a" * 60),), edges=())
    assert len(draw_lineage(alone).boxes[0].name) <= 20
