"""The page of a study in a browser: names of any length and script, on a screen and on a phone."""

import json

import pytest
from study_runs import made_up_study

from moebed.study.page import present
from tests.browser import Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium, which is not installed"),
]
LONG = "an_arm_that_changes_model.config.router_and_model.config.norm_topk_prob_and_more_than_a_phone_has_room_for"
LOSSES = {"_base $x_1$": [3.0, 3.1, 3.2], LONG: [2.9, 3.0, 3.05], "<b>论文</b>": [3.0, 3.0, 3.0]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.json").write_text(json.dumps(made_up_study(LOSSES)))
    present(folder)
    with Browser(1400, 1000) as browser:
        browser.open((folder / "report.html").as_uri())
        yield browser, folder


def test_a_phone_shows_it_without_moving_it_sideways(page):
    browser, folder = page
    browser.resize(390, 844, mobile=True)
    browser.screenshot(folder / "seen" / "phone.png", whole=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    first = "Math.min(...[...document.querySelectorAll('td:first-child')].map((cell) => cell.clientWidth))"
    assert browser.evaluate(first) >= 100  # a name is not a column of letters


def test_no_number_and_no_word_of_a_head_is_broken(page):
    browser, folder = page
    browser.resize(1400, 1000)
    browser.screenshot(folder / "seen" / "screen.png", whole=True)
    lines = "(cell) => { const all = new Range(); all.selectNodeContents(cell); return all.getClientRects().length; }"
    for cells in ("'td.number'", "'th'"):
        broken = f"[...document.querySelectorAll({cells})].filter((cell) => ({lines})(cell) > 1)"
        said = browser.evaluate(f"{broken}.map((cell) => cell.textContent)")
        assert [one for one in said if " " not in one and len(one) < 20] == []
        assert cells == "'th'" or said == []


def test_it_has_its_headings_and_its_links(page):
    browser, _ = page
    assert browser.problems() == []
    assert browser.errors == []
    assert [line for line in browser.lines() if line.startswith("Study ")] == ["Study made_up"]
    assert any(LONG in line for line in browser.lines())
