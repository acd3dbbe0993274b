"""The report in a browser: the first screen answers, the search finds, a phone shows all of it."""

import pytest
from probe_cases import all_needs, probe
from routed_cases import text_of

from moebed.views.live import walk
from probes.report.page import write_report
from probes.running import store
from tests.browser import Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium, which is not installed"),
]
PROBED = ("balance", "norm_vs_score", "domain_share", "repeats", "routing", "matrix_similarity")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of one run of six layers in a browser; and of three, of which two are one."""
    import torch

    from moebed.model.decoder import Decoder
    from tests.conftest import tiny_config

    folders = [tmp_path_factory.mktemp("runs") / name for name in ("one", "two")]
    ids = torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(1)).tolist()
    words = tuple(f"w{number}" for row in ids for number in row)
    text = text_of(ids, [0, 1] * 4, ("prose", "code"), words)
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        results = probe(walk(Decoder(tiny_config(num_hidden_layers=6)), text, all_needs()), *PROBED)
        for name, result in results.items():
            store.save_arrays(folder, name, result.arrays)
        (folder / "config.yaml").write_text("model: tiny\n" + "long: " + "x" * 400 + "\n")
    path = write_report(folders[:1], folders[0])
    both = write_report([*folders, folders[0]], folders[0].parent / "both.html")  # three columns
    with Browser(1400, 1000) as browser:
        browser.open(path.as_uri())
        yield browser, path, both, words


def look_for(browser, text):
    browser.evaluate(f"(box => {{box.value = {text!r}; box.dispatchEvent(new Event('input'))}})(search)")
    return browser.evaluate("found.innerText")


def test_the_first_screen_answers_the_questions(page):
    browser, path, _, _ = page
    browser.resize(1400, 1000)
    browser.screenshot(path.parent / "seen" / "first.png")
    for name in ("norm", "depth", "last_layer", "domains"):
        bottom = browser.evaluate(f"document.getElementById('question-{name}').getBoundingClientRect().bottom")
        assert 0 < bottom < 1000, name
    lines = " ".join(browser.lines())
    assert lines.index("95 %:") < lines.index("Every probe", 200)


def test_the_first_screen_of_several_runs_has_more_than_one_question(page):
    browser, path, both, _ = page
    browser.resize(1400, 1000)
    browser.open(both.as_uri())
    bottom = [
        browser.evaluate(f"document.getElementById('question-{name}').getBoundingClientRect().bottom")
        for name in ("norm", "depth", "last_layer")
    ]
    browser.open(path.as_uri())
    assert max(bottom[:2]) < 1000, bottom


def test_what_was_published_stands_beside_any_number_of_runs(page):
    browser, path, both, _ = page
    browser.resize(1400, 1000)
    browser.open(both.as_uri())
    right = (
        "Math.max(...[...document.querySelectorAll('.question > p')].map((one) => one.getBoundingClientRect().right))"
    )
    assert browser.evaluate(right) <= 1400
    browser.open(path.as_uri())


def test_a_picture_fills_the_window_when_it_is_clicked(page):
    browser, _, _, _ = page
    browser.resize(1400, 1000)
    width = "document.querySelector('.shown img').getBoundingClientRect().width"
    before = browser.evaluate(width)
    browser.evaluate("document.querySelector('.shown img').click()")
    assert browser.evaluate(width) > max(1300, 2 * before)
    browser.evaluate("document.querySelector('.shown img').click()")
    assert browser.evaluate(width) == before


def test_the_search_finds_layers_experts_tokens_and_probes(page):
    browser, _, _, words = page
    found = look_for(browser, "layer 3")
    assert "balance: max_violation" in found
    assert "Busiest experts" in found
    found = look_for(browser, "expert 2")
    assert [line.split()[0] for line in found.splitlines() if line[:1].isdigit()] == list("012345")
    assert len([line for line in look_for(browser, "expert 2 layer 4").splitlines() if line[:1] == "4"]) == 1
    marked = look_for(browser, words[0])
    assert f"token {words[0]}" in marked
    assert browser.evaluate("document.querySelectorAll('.hit').length") >= 1
    assert "probe norm_vs_score" in look_for(browser, "norm_vs")
    assert "Nothing: try" in look_for(browser, "expert 999")
    assert look_for(browser, "") == ""
    assert browser.evaluate("document.querySelectorAll('.hit').length") == 0


@pytest.mark.parametrize("several", [False, True])
def test_a_phone_shows_the_page_without_moving_it_sideways(page, several):
    browser, path, both, _ = page
    browser.resize(390, 844, mobile=True)
    browser.open((both if several else path).as_uri())
    browser.screenshot(path.parent / "seen" / f"phone_{several}.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("several", [False, True])
def test_nothing_on_the_page_leads_nowhere_or_has_no_words(page, several):
    browser, path, both, words = page
    browser.open((both if several else path).as_uri())
    for text in ("layer 3", "expert 2", words[0]):
        look_for(browser, text)
    look_for(browser, "")
    assert browser.problems() == []
    assert browser.errors == []


def test_what_the_search_may_be_asked_can_be_read_whole(page):
    browser, path, _, _ = page
    browser.resize(1400, 1000)
    browser.open(path.as_uri())
    assert browser.evaluate("(search.value = search.placeholder, search.scrollWidth <= search.clientWidth)")


def test_a_picture_that_a_key_would_enlarge_is_seen_to_be_chosen(page):
    browser, path, _, _ = page
    browser.resize(1400, 1000)
    browser.open(path.as_uri())
    outline = "getComputedStyle(document.querySelector('.shown img')).outlineStyle"
    assert browser.evaluate(outline) == "none"
    browser.evaluate("document.querySelector('.shown input').focus({focusVisible: true})")
    assert browser.evaluate(outline) == "solid"
