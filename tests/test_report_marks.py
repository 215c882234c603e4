"""A warning stands on the curve that shows it, at its step, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from run_records import NASTY, eval_line, measured, train_line, write_jsonl, write_run
from upweight.evidence.records import Records, Suspected, Warned, read_records
from upweight.evidence.report.sections_curves import curves
from upweight.evidence.report.sections_examples import labels
from upweight.evidence.report.sections_record import warnings


def records(*warned: Warned) -> Records:
    steps = range(0, 41, 10)
    return Records(
        "run",
        train=tuple(measured(train_line(step)) for step in range(1, 41)),
        evals={
            name: tuple(measured(eval_line(step, name)) for step in steps)
            for name in ("easy", "hard")
        },
        warnings=warned,
    )


def marked(html: str) -> dict[str, list[tuple[str, float]]]:
    """By title of a chart: the codes on it, and where from the left, in percent."""
    charts = re.findall(r'<figure class="chart"><figcaption>(.*?) <small>.*?</figure>', html, re.S)
    bodies = re.findall(r'<figure class="chart">(.*?)</figure>', html, re.S)
    found: dict[str, list[tuple[str, float]]] = {}
    for title, body in zip(charts, bodies, strict=True):
        chips = re.findall(r'style="left:([\d.]+)%;--level:\d+" href="#warning-(\w+)"', body)
        if chips:
            found[title] = [(code, float(left)) for left, code in chips]
        assert body.count('<path class="warned"') == len(chips)
    return found


def warned(code: str, step: int | None, metric: str, **rest: Any) -> Warned:
    return Warned(code, f"step {step}: said", (), step, metric, **rest)


def test_a_warning_of_training_is_on_the_chart_of_its_metric():
    html = curves(records(warned("UW304", 20, "logratios/chosen")))
    assert marked(html) == {"Change of log-prob: train": [("uw304", 50.0)]}


def test_a_warning_of_a_set_is_on_the_chart_of_that_set():
    html = curves(records(warned("UW305", 10, "length", set="hard")))
    assert marked(html) == {"Sampled length: hard": [("uw305", 25.0)]}
    html = curves(records(warned("UW304", 10, "logratios/chosen", set="hard")))
    assert marked(html) == {"Change of log-prob: hard": [("uw304", 25.0)]}


def test_a_sampled_kl_below_0_is_marked_on_the_chart_of_the_kl():
    html = curves(records(warned("UW308", 20, "kl_high", set="hard")))
    assert marked(html) == {"Sampled KL": [("uw308", 50.0)]}


def test_one_chart_of_several_sets_has_the_warnings_of_each_and_of_training():
    html = curves(
        records(
            warned("UW306", 40, "rewards/accuracies"),
            warned("UW308", 0, "rewards/accuracies", set="easy"),
        )
    )
    assert marked(html) == {"Accuracy": [("uw308", 0.0), ("uw306", 100.0)]}


def test_what_was_seen_before_step_one_or_on_no_curve_is_on_no_chart():
    html = curves(records(warned("UW210", None, "loss"), warned("UW304", 20, "")))
    assert marked(html) == {}


def test_codes_that_would_meet_stand_one_above_the_other():
    html = curves(records(*(warned(f"UW30{n}", 20 + n, "loss") for n in (4, 5, 6))))
    assert re.findall(r"--level:(\d)", html) == ["0", "1", "2"]
    assert 'class="plot" style="--levels:3"' in html
    html = curves(records(warned("UW304", 5, "loss"), warned("UW305", 30, "loss")))
    assert re.findall(r"--level:(\d)", html) == ["0", "0"]
    assert 'class="plot" style="--levels:1"' in html


def test_a_chip_leads_to_its_line_and_says_the_same():
    said = f"step 20: {NASTY}"
    found = records(Warned("UW304", said, (), 20, "loss"))
    html = curves(found)
    assert 'href="#warning-uw304"' in html and '<code id="warning-uw304">' in warnings(found)
    # As a tooltip, and for the crosshair as JSON, from which no text breaks out.
    assert "<script>document" not in html and "\\u003cscript>document" in html
    assert re.search(r'title="step 20: &lt;script&gt;', html)


def test_the_records_say_where_a_warning_belongs(tmp_path: Path):
    run = write_run(tmp_path)
    line = {"step": 14, "kind": "warning", "code": "UW308", "said": "far.", "rows": []}
    write_jsonl(run / "metrics.jsonl", [eval_line(14), {**line, "metric": "kl", "set": "heldout"}])
    found = read_records(run).warnings[-1]
    assert (found.metric, found.set, found.step) == ("kl", "heldout", 14)
    write_jsonl(run / "metrics.jsonl", [eval_line(14), line])
    found = read_records(run).warnings[-1]
    assert (found.metric, found.set) == ("", None)


def suspected(i: int, **values: Any) -> Suspected:
    base: dict[str, Any] = {
        "set": "train", "row": f"pairs.jsonl:{i}", "prompt": "Say it.", "chosen": "bad",
        "rejected": "good", "margin": -1.5, "odds_model": 5.0, "odds_words": 6.0, "why": "So.",
    }  # fmt: skip
    return Suspected(**{**base, **values})


def test_labels_to_review_are_shown_the_surest_first_and_counted():
    html = labels(Records("run", suspects=tuple(suspected(i) for i in range(20))))
    assert "20 preferences to read" in html and "8 more in suspects.jsonl" in html
    assert html.index("pairs.jsonl:0<") < html.index("pairs.jsonl:1<") < html.index("10 more")
    assert "<script>document" not in labels(Records("run", suspects=(suspected(1, why=NASTY),)))
    assert labels(Records("run")) == ""


def test_labels_to_review_are_read_from_their_file(tmp_path: Path):
    run = write_run(tmp_path)
    line = {name: getattr(suspected(3), name) for name in Suspected.__slots__}
    write_jsonl(run / "suspects.jsonl", [{**line, "chosen_index": 0}])
    assert read_records(run).suspects == (suspected(3),)


def test_what_two_observers_say_of_one_metric_is_kept_for_each_set(tmp_path: Path):
    run = write_run(tmp_path)
    metric = {"code": "UW306", "metric": "rewards/accuracies", "rows": []}
    seen = [
        {"step": step, "kind": "warning", **metric, "said": said, "observer": observer, **where}
        for step, said, observer, where in (
            (8, "solved.", "too_easy", {}),
            (10, "by heart.", "not_better_than_chance", {"set": "heldout"}),
            (10, "by heart too.", "not_better_than_chance", {"set": "hard"}),
            (20, "again.", "not_better_than_chance", {"set": "hard"}),
        )
    ]
    write_jsonl(run / "metrics.jsonl", [train_line(1), *seen])
    found = [w.said for w in read_records(run).warnings if w.code == "UW306"]
    assert found == ["solved.", "by heart.", "by heart too."]


def test_each_metric_that_shows_a_code_is_kept_and_one_line_is_what_a_mark_leads_to(tmp_path: Path):
    run = write_run(tmp_path)
    seen = [
        {"step": 10, "kind": "warning", "code": "UW305", "said": said, "rows": [], "metric": metric}
        for metric, said in (("length", "long."), ("stopped", "endless."), ("length", "again."))
    ]
    write_jsonl(run / "metrics.jsonl", [train_line(1), *seen])
    found = read_records(run)
    assert [w.said for w in found.warnings if w.code == "UW305"] == ["long.", "endless."]
    html = warnings(found)
    assert html.count('id="warning-uw305"') == 1 and html.count("<code") == 1 + html.count("UW305")
