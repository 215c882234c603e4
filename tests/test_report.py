from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from run_records import (
    NASTY,
    eval_line,
    evaluated,
    ledger,
    ledger_row,
    measured,
    sample,
    set_account,
    trained,
    write_run,
)
from upweight.errors import DataError, OutputError
from upweight.evidence.records import (
    Comparison,
    ComparisonRow,
    LedgerRow,
    Records,
    Sample,
    Setting,
    Suspected,
    Warned,
    read_records,
)
from upweight.evidence.report import SECTIONS, render, write_report
from upweight.evidence.report.sections_examples import preferences, samples
from upweight.evidence.report.sections_numbers import comparison, key_numbers
from upweight.evidence.report.sections_record import config, environment, rows


def test_pairs_are_grouped_by_how_sure_the_policy_is():
    margins = (3.0, -2.0, 0.01, 1.0, math.nan)
    pairs = tuple(LedgerRow(**ledger_row(i, margin=m)) for i, m in enumerate(margins))
    html = preferences(evaluated(eval_line(20), ledger=pairs))
    assert "margin +3.00" in html and "margin −2.00" in html
    agrees, disagrees = html.index("and the label agrees"), html.index("and the label disagrees")
    assert agrees < html.index("margin +3.00") < html.index("margin +1.00") < disagrees
    assert disagrees < html.index("margin −2.00")
    assert "Not finite margins: 1." in html


def test_the_least_sure_pairs_are_those_closest_to_zero():
    pairs = tuple(LedgerRow(**ledger_row(i, margin=0.1 * (i - 10))) for i in range(30))
    html = preferences(evaluated(eval_line(20), ledger=pairs))
    assert "margin 0<" in html[html.index("Least sure") :]


def test_a_ledger_without_texts_still_has_its_histogram():
    html = preferences(evaluated(eval_line(20), ledger=ledger(5, chosen_text=None)))
    assert "Margins on heldout" in html and "texts of the preferences are not recorded" in html
    assert "No preferences" in preferences(Records("run"))


def test_the_other_sets_pairs_are_folded():
    pairs = ledger(3) + ledger(3, set="other")
    html = preferences(evaluated(eval_line(20), ledger=pairs))
    assert "<summary>Set <bdi>other</bdi>, step 20: 3 preferences</summary>" in html


def test_the_last_sample_of_a_prompt_is_shown_and_earlier_ones_are_folded():
    drawn = tuple(Sample(**sample(step)) for step in (0, 10, 20))
    html = samples(Records("run", samples=drawn))
    assert html.index("Policy answer at 20") < html.index("earlier answers: 2 of 2")
    assert "4 tokens, log-ratio 2.50" in html
    many = tuple(Sample(**sample(20, f"Prompt {i}")) for i in range(30))
    html = samples(Records("run", samples=many))
    assert "21 more prompts" in html and "6 prompts more in samples.jsonl" in html
    bare = Sample(20, "heldout", "p", "a", "b", None, None, None, None)
    assert "log-ratio" not in samples(Records("run", samples=(bare,))).split("</p>", 1)[1]


def test_rows_that_do_not_add_up_are_called_out():
    html = rows(Records("run", accounts={"train": set_account(used=97)}, template="chat"))
    assert "do not add up: 100 read, 97 used, 2 dropped" in html
    assert "do not add up" not in rows(Records("run", accounts={"train": set_account()}))
    assert "both responses are the same" in html and "1\u202f200" in html
    empty = set_account(read=0, used=0, dropped={}, lengths={})
    assert "No row was dropped." in rows(Records("run", accounts={"train": empty}))


def test_settings_are_ordered_by_who_chose_them():
    settings = (
        Setting("seed", "0", "default"),
        Setting("max_length", "512", "resolved"),
        Setting("beta", "0.2", "file run.yaml"),
        Setting("lora", "null", "default"),
    )
    html = config(Records("run", settings=settings))
    order = [html.index(key) for key in ("beta", "max_length", "2 defaults", "seed", "lora")]
    assert order == sorted(order)
    assert '<span class="none">none</span>' in html


def test_the_environment_names_each_of_several_digests():
    digests = {"data_digests": {"train": "ab12", "prompts": "cd34"}, "reward_digests": {}}
    html = environment(Records("run", environment=digests))
    assert "train ab12, prompts cd34" in html and ">none</code>" in html


def test_the_environment_says_how_long_the_run_took():
    times = {"started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T03:08:17+00:00"}
    html = environment(Records("run", environment={**times, "gpu": None, "sharing": True}))
    assert "4 min 12 s" in html and ">none<" in html and ">yes<" in html
    for broken in ({"finished": None}, {"finished": 3}, {"finished": "2026-01-02T03:08:17"}):
        assert "duration" not in environment(Records("run", environment={**times, **broken}))


def test_a_comparison_is_a_table_and_its_absence_nothing():
    found = Comparison("Held out", (ComparisonRow("VADER", "0.2", "0.6", "true reward"),))
    html = comparison(Records("run", comparison=found))
    assert "Held out" in html and "<td>0.6</td>" in html and "true reward" in html
    assert comparison(Records("run")) == ""


def test_several_sets_are_listed_with_what_was_measured():
    bare = measured({"step": 1, "epoch": 1.0, "set": "b", "loss": 0.5})
    records = Records("run", evals={"a": (measured(eval_line(20)),), "b": (bare,)})
    html = key_numbers(records)
    assert "Every evaluation set" in html and "<td>–</td>" in html
    assert "Every evaluation set" not in key_numbers(evaluated(eval_line(20)))


class Page(HTMLParser):
    """What the browser would load, and the text by element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.scripts = 0
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                self.loads.append(value or "")
            if name == "style" and value and re.search(r"url\(|@import", value):
                self.loads.append(value)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self.headings.append(data)
        if self._inside == "style" and re.search(r"url\(|@import", data):
            self.loads.append(data)


OPTIONAL = ("Before and after", "Reward against KL")
"""The sections that a run of preferences alone does not have."""

TEXTS = ("set", "row", "prompt", "chosen", "rejected", "why")
NUMBERS = ("margin", "odds_model", "odds_words")


def nasty_records() -> Records:
    """Every text that comes from outside replaced by one that tries to break the page."""
    lines = (eval_line(0, NASTY), eval_line(20, NASTY))
    texts = {"prompt_text": NASTY, "chosen_text": NASTY * 20, "rejected_text": ""}
    sampled = sample(20, NASTY, policy=NASTY, reference=NASTY, set=NASTY)
    entry = set_account(dropped={NASTY: 2}, examples={NASTY: [[NASTY, NASTY]]})
    return Records(
        NASTY,
        train=trained(3),
        evals={NASTY: tuple(map(measured, lines))},
        ledger=ledger(9, set=NASTY, row=NASTY, **texts),
        samples=(Sample(**sampled),),
        accounts={NASTY: entry},
        template=NASTY,
        settings=(Setting(NASTY, NASTY, NASTY), Setting("objective", NASTY, NASTY)),
        environment={NASTY: NASTY, "model": NASTY, "upweight": NASTY, "finished": NASTY},
        warnings=(Warned(NASTY, NASTY, (NASTY,), 3, "loss"),),
        suspects=(Suspected(**dict.fromkeys(TEXTS, NASTY), **dict.fromkeys(NUMBERS, 1.0)),),
        comparison=Comparison(NASTY, (ComparisonRow(NASTY, NASTY, NASTY, NASTY),)),
        notes=(NASTY,),
    )


def test_the_report_of_a_finished_run_has_every_section(tmp_path: Path):
    run = write_run(tmp_path)
    assert write_report(run) == run / "report.html"
    headings = Page((run / "report.html").read_text(encoding="utf-8")).headings
    assert headings == [title for title, _ in SECTIONS if title not in OPTIONAL]


def test_warnings_are_shown_with_where_they_were_found(tmp_path: Path):
    html = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    section = html[html.index('id="warnings"') : html.index('id="key-numbers"')]
    for said in ("UW210", "before step 1", "train: a circle.", "pairs.jsonl:3", "step 14"):
        assert said in section


def test_the_page_loads_nothing():
    for records in (nasty_records(), Records("run")):
        loads = Page(render(records)).loads
        assert all(load.startswith("#") or load == "data:," for load in loads), loads


def test_no_text_of_the_run_becomes_markup():
    html = render(nasty_records())
    html.encode("utf-8")
    assert "\x00" not in html and "<script>document" not in html
    charts = html.count('<script type="application/json">')
    # One script for each chart's numbers and one of ours.
    assert Page(html).scripts == charts + 1


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("model: m  # flag\n")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "account.json is missing" in html and "No step and no evaluation is recorded" in html
    assert "No sampled answers" in html and "environment.json is not there" in html


def test_every_section_reads_an_empty_record():
    for _, section in SECTIONS:
        assert isinstance(section(Records("run")), str)


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path):
    run = write_run(tmp_path)
    before = write_report(run).read_bytes()
    (run / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(DataError):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    run = write_run(tmp_path)
    (run / "report.html").mkdir()
    with pytest.raises(OutputError, match="report.html cannot be written: Is a directory"):
        write_report(run)
    assert not list(run.glob(".tmp-*"))


def test_a_long_run_is_drawn_from_a_bounded_number_of_points():
    def size(num_steps: int) -> int:
        evals = tuple(measured(eval_line(step)) for step in range(0, num_steps, 2))
        return len(render(Records("run", train=trained(num_steps), evals={"heldout": evals})))

    # Fourteen lines of at most 600 points, their means and their numbers.
    assert size(8000) < 1_500_000
    assert size(8000) < 1.3 * size(4000)


def _browser() -> str:
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    name = next(filter(None, found), None)
    if name is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    return name


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]


def _dom(page: Path, profile: Path) -> str:
    """The page's elements after a browser has laid it out and run its script."""
    command = [_browser(), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8")


def test_a_browser_shows_every_section_and_runs_only_our_script(tmp_path: Path):
    run = tmp_path / "run"
    page = write_report(write_run(run))
    dom = _dom(page, tmp_path / "profile")
    for title, _ in SECTIONS:
        assert (f"<h2>{title}</h2>" in dom) == (title not in OPTIONAL)
    # Only the script gives legend keys their role.
    assert 'role="button" aria-pressed="true"' in dom
    page.write_text(render(nasty_records()), encoding="utf-8")
    dom = _dom(page, tmp_path / "profile")
    assert 'role="button" aria-pressed="true"' in dom
    assert "<title>owned" not in dom and "&lt;script&gt;document" in dom


def test_the_browser_refuses_a_script_that_is_not_ours(tmp_path: Path):
    page = write_report(write_run(tmp_path / "run"))
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("<main>", "<main><script>document.title='owned'</script>"))
    assert "<title>owned" not in _dom(page, tmp_path / "profile")


def test_the_report_reads_what_the_records_say(tmp_path: Path):
    run = write_run(tmp_path)
    assert render(read_records(run)) == write_report(run).read_text(encoding="utf-8")
