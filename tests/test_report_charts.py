from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from run_records import (
    eval_line,
    measured,
    train_line,
    trained,
)
from upweight.evidence.records import (
    Measurement,
    Records,
    Setting,
)
from upweight.evidence.report.charts import Chart, Event, Guide, Series, line_chart, path
from upweight.evidence.report.histogram import bins, histogram
from upweight.evidence.report.markup import (
    count,
    duration,
    esc,
    number,
    passage,
    percent,
    points,
    ticks,
)
from upweight.evidence.report.scales import (
    Scale,
    axis,
    log_ticks,
    nice_ticks,
    running_mean,
    smoothing_window,
    thin,
    widen,
)
from upweight.evidence.report.sections_curves import curves, displacement_note, epochs
from upweight.stats import Interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.6931, "0.693"),
        (-12.34, "−12.3"),
        (9.999, "10.0"),
        (1234.5, "1\u202f230"),
        (5e-7, "5e-7"),
        (-1.25e-5, "−1.25e-5"),
        (3.2e9, "3.2e9"),
        (math.nan, "not finite"),
        (7, "7.00"),
    ],
)
def test_numbers_keep_three_digits(value: float, text: str):
    assert number(value) == text


def test_shares_are_whole_percents_that_never_round_to_none_or_all():
    assert percent(0.784) == "78\u202f%"
    assert (percent(0.0), percent(1.0)) == ("0\u202f%", "100\u202f%")
    assert (percent(0.003), percent(0.997)) == ("0.3\u202f%", "99.7\u202f%")


def test_words_for_counts_times_and_differences():
    assert count(1234567) == "1\u202f234\u202f567"
    assert [duration(s) for s in (42.4, 252.0, 11100.0)] == ["42 s", "4 min 12 s", "3 h 5 min"]
    assert points(Interval(-0.16, -0.25, -0.06)) == "−16 percentage points [−25, −6]"
    assert points(Interval(0.16, math.nan, math.nan)) == "+16 percentage points"


def test_axis_labels_share_their_decimals():
    assert ticks([-0.5, 0.0, 0.5, 1.0]) == ["−0.5", "0.0", "0.5", "1.0"]
    assert ticks([0.0, 2000.0]) == ["0", "2\u202f000"]
    assert ticks([0.0, 1e-5]) == ["0", "1e-5"]


@given(st.text())
def test_any_text_becomes_inert_html(text: str):
    escaped = esc(text)
    assert not set(escaped) & set("<>\"'\x00")
    escaped.encode("utf-8")
    assert not re.search(r"&(?!(amp|lt|gt|quot|#x27);)", escaped)


def test_what_cannot_be_shown_becomes_a_visible_mark():
    assert esc("a\x00b\ud800c\nd\u202ee\U0001f3ac") == "a\ufffdb\ufffdc\nd\ufffde\U0001f3ac"


def test_long_texts_are_folded_and_huge_ones_cut_with_their_count():
    assert "<details" not in passage("short") and "short" in passage("short")
    folded = passage("word " * 200)
    assert folded.count("<details") == 1 and "show all 1\u202f000 characters" in folded
    assert "not shown" not in folded
    assert "4\u202f000 more characters are not shown" in passage("x" * 10_000)
    assert "(empty)" in passage(" \n")


# Scales

FINITE = st.floats(-1e12, 1e12)


@given(FINITE, FINITE)
def test_nice_ticks_cover_the_range_in_steps_of_one_two_or_five(a: float, b: float):
    low, high = min(a, b), max(a, b)
    if not high - low > 1e-9 * max(1.0, abs(low), abs(high)):
        return
    marks = nice_ticks(low, high)
    step = marks[1] - marks[0]
    slack = 1e-6 * step
    assert marks[0] <= low + slack and marks[-1] >= high - slack
    assert 3 <= len(marks) <= 12
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


@given(st.floats(1e-12, 1e12), st.floats(1.01, 1e9))
def test_log_ticks_cover_the_range(low: float, ratio: float):
    marks = log_ticks(low, low * ratio)
    assert marks[0] <= low * (1 + 1e-9) and marks[-1] >= low * ratio * (1 - 1e-9)
    assert 2 <= len(marks) <= 9


@given(st.lists(FINITE, min_size=1, max_size=5), st.booleans())
def test_an_axis_holds_its_values(values: list[float], log: bool):
    values = [abs(v) + 1e-6 for v in values] if log else values
    scale, marks = axis(values, log=log)
    assert scale.low < scale.high and len(marks) >= 2
    assert all(-1e-6 <= scale.at(value) <= 1 + 1e-6 for value in values)


def test_a_scale_maps_its_ends_to_zero_and_one():
    assert [Scale(2.0, 4.0).at(v) for v in (2.0, 3.0, 4.0)] == [0.0, 0.5, 1.0]
    assert Scale(1.0, 100.0, log=True).at(10.0) == pytest.approx(0.5)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=200))
def test_thinning_keeps_the_lowest_and_highest_value_and_the_order(ys: list[float]):
    line = [(float(i), y) for i, y in enumerate(ys)]
    kept = thin(line, buckets=10)
    assert len(kept) <= 20
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    finite = [y for y in ys if math.isfinite(y)]
    if finite:
        drawn = [y for _, y in kept if math.isfinite(y)]
        assert (min(drawn), max(drawn)) == (min(finite), max(finite))


def test_a_running_mean_is_the_mean_of_its_window():
    line = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 6.0), (4.0, 10.0)]
    means = running_mean(line, 3)
    assert [y for _, y in means] == [1.5, 1.5, 4.0, 8.0, 8.0]
    assert math.isnan(running_mean([(0.0, math.inf)], 3)[0][1])
    assert running_mean(line, 1, at_most=2) == [(0.0, 1.0), (4.0, 10.0)]


def test_one_huge_value_does_not_spoil_the_means_after_it():
    line = [(0.0, 1e300)] + [(float(i), 0.1) for i in range(1, 50)]
    assert running_mean(line, 3)[-1][1] == pytest.approx(0.1, rel=1e-12)


def test_short_runs_are_not_smoothed_and_windows_are_odd():
    assert smoothing_window(59) == 1
    assert all(smoothing_window(n) % 2 == 1 for n in range(1, 500))


def test_a_widened_band_holds_every_interval():
    band = [(float(i), math.sin(i) - 1, math.sin(i) + 1) for i in range(100)]
    wide = widen(band, buckets=10)
    assert len(wide) == 10
    assert min(low for _, low, _ in wide) == min(low for _, low, _ in band)
    assert max(high for _, _, high in wide) == max(high for _, _, high in band)


# Charts


def _chart(*series: Series, **options: Any) -> Chart:
    return Chart("Title", "unit", "How to read.", series, **options)


LINE = Series("a", ((0.0, 1.0), (1.0, 3.0), (2.0, 2.0)), "t-1")


def test_a_path_is_interrupted_where_a_value_is_missing():
    x, y = Scale(0.0, 3.0), Scale(0.0, 1.0)
    line = [(0.0, 0.0), (1.0, 1.0), (2.0, math.nan), (3.0, 0.5)]
    assert path(line, x, y) == "M0.0 400.0L333.3 0.0M1000.0 200.0"


def test_a_chart_without_a_finite_value_is_no_chart():
    assert line_chart(_chart()) == ""
    assert line_chart(_chart(Series("a", ((0.0, math.nan),), "t-1"))) == ""


def test_a_chart_says_how_to_read_it_and_what_it_left_out():
    html = line_chart(_chart(replace(LINE, points=(*LINE.points, (3.0, math.inf)))))
    assert "How to read. Values that are not finite (1) are gaps." in html
    assert 'aria-label="Title: a from 1.00 at 0 to 2.00 at 2"' in html
    steps = tuple((float(i), float(i % 7)) for i in range(3000))
    html = line_chart(_chart(Series("a", steps, "t-1", smooth=True)))
    assert "Bold is the mean of 101 logged steps" in html
    assert "Drawn from 3\u202f000 logged values" in html


def test_a_logarithmic_axis_needs_positive_values():
    assert "unit, log scale" in line_chart(_chart(LINE, log=True))
    linear = line_chart(_chart(replace(LINE, points=((0.0, 0.0), (1.0, 2.0))), log=True))
    assert "log scale" not in linear
    assert "The axis is linear because a value is zero or less." in linear


def test_guides_and_events_are_drawn_where_they_lie_and_left_out_beyond_the_axes():
    guides = (Guide(2.0, "two"), Guide(99.0, "far"))
    events = (Event(1.0, "one"), Event(1.9, "late"), Event(7.0, "gone"))
    html = line_chart(_chart(LINE, guides=guides, events=events))
    assert html.count('class="guide"') == 1 and "two" in html and "far" not in html
    assert html.count('class="event"') == 2 and "gone" not in html
    assert "left:50.00%" in html and "right:5.00%" in html


def test_a_single_evaluation_shows_its_interval_as_a_stroke():
    once = Series("a", ((5.0, 0.6),), "t-1", band=((5.0, 0.5, 0.7),), marked=True)
    html = line_chart(_chart(once))
    assert html.count('class="whisker"') == 1 and html.count('class="mark"') == 1


def test_the_numbers_beside_a_chart_cannot_end_their_element():
    html = line_chart(_chart(replace(LINE, name="</script><script>")))
    assert html.count("<script") == html.count("</script>") == 1


def test_many_sets_get_a_chart_each():
    rows = tuple(map(measured, (eval_line(0), eval_line(20))))
    few = curves(Records("run", evals={name: rows for name in "abc"}))
    many = curves(Records("run", evals={name: rows for name in "abcd"}))
    assert "<figcaption>Accuracy <small>" in few
    assert "<figcaption>Accuracy: d <small>" in many


def test_a_metric_that_no_line_has_is_named_as_not_recorded():
    html = curves(Records("run", train=trained(3)))
    sampled = "sampled kl, sampled length, repetition, answers that end by themselves"
    assert f"Not recorded in this run: {sampled}." in html
    assert "No step and no evaluation" in curves(Records("run"))


def test_only_dpo_starts_at_ln_2():
    records = Records("run", train=trained(3))
    assert "ln 2" in curves(records)
    assert "ln 2" not in curves(replace(records, settings=(Setting("objective", "sft", "flag"),)))


def test_epochs_are_marked_unless_there_are_many():
    def marks(per_epoch: int) -> list[str]:
        steps = range(1, 41)
        return [e.label for e in epochs([_at(step, step / per_epoch) for step in steps])]

    assert marks(20) == ["epoch 2"]
    assert marks(100) == []
    assert marks(2) == []


def _at(step: int, epoch: float) -> Measurement:
    return Measurement(step, epoch, None, {"loss": 0.1})


def test_likelihood_displacement_is_noted_only_when_chosen_fell():
    fell = [measured(train_line(step, **{"logratios/chosen": -2.0})) for step in (1, 2)]
    assert displacement_note(fell).startswith("Chosen ended 2.00 nats below the reference.")
    assert displacement_note(trained(2)) == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_a_histogram_counts_every_value_once(values: list[float]):
    binned = bins(values)
    assert sum(binned.counts) == len(values)
    assert binned.num_outside <= 2 * (len(values) // 200)
    edges = [binned.edge(i) for i in range(len(binned.counts) + 1)]
    assert min(map(abs, edges)) == 0


def test_a_far_value_is_counted_in_the_outermost_bar_and_said():
    # Half a percent of 400 values is 2: the axis ends at the third largest.
    html = histogram("T", "u", [0.01 * i for i in range(399)] + [1e6], "Read.")
    assert "Read. Values beyond the axis (2) are counted in its outermost bars." in html
    assert histogram("T", "u", [math.nan], "Read.") == ""
