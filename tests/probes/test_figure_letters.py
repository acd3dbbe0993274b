"""Names and tokens of any kind in pictures: written as they are, and no warning, error or empty legend."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from probes.figures import drawing, letters
from probes.figures.coloured_tokens import _drawable, _pieces
from probes.figures.domains import share_panels
from probes.figures.drawing import to_rgb
from probes.figures.effects import draw_by_confidence
from probes.report.charts import draw_losses
from probes.running.run_folder import RunFolder

ODD = ["_hidden", r"$\frac$", "$x$ and $y$", "a\nb\tc", "\x07\u202e\u200b", "<script>", "שלום", "论文", "\U000e0001"]


@pytest.fixture
def draw():
    """Draws a figure, and gives what its texts say; a warning, such as of a missing letter, is an error."""

    def said(fig: Figure) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            to_rgb(fig)
        return [text.get_text() for text in fig.findobj(lambda artist: hasattr(artist, "get_text"))]

    return said


def seen(axis):
    """The labels of ticks within the limits of an axis."""
    low, high = axis.get_view_interval()
    labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [text.get_text() for at, text in labels if low <= at <= high]


def test_names_are_seen_whole_and_start_nothing():
    shown = [letters.plain(name) for name in ODD]
    assert shown[:5] == [" _hidden", r"\$\frac\$", r"\$x\$ and \$y\$", "a⏎b⇥c", r"\x07\u202e\u200b"]
    assert shown[8] == r"\U000e0001"
    assert letters.plain("\uefff") == r"\uefff"


def test_of_a_long_name_both_ends_stay():
    names = [f"model.config.router=norm_topk_{number}" for number in range(2)]
    short = [letters.plain(name, 22) for name in names]
    assert [len(name) for name in short] == [22, 22]
    assert short == ["model.confi…orm_topk_0", "model.confi…orm_topk_1"]
    assert letters.plain("short", 22) == "short"


def test_names_that_differ_amid_others_of_one_length_are_told_apart(draw, tmp_path):
    names = [f"runs_of_a_long_sweep_lr_{rate}_and_all_settings_the_same_seed_1" for rate in ("0.001", "0.002", "0.04")]
    assert list(letters.apart([*names, names[0]], 40).values()) == [
        "…p_lr_0.001_and_all_…ngs_the_same_seed_1",
        "…p_lr_0.002_and_all_…ngs_the_same_seed_1",
        "…p_lr_0.04_and_all_s…ngs_the_same_seed_1",
    ]
    assert letters.apart(["one", "two"], 40) == {"one": "one", "two": "two"}
    far = ["a" * 30 + one + "b" * 30 + two + "c" * 30 for one in "xy" for two in "xy"]
    assert len({*letters.apart(far, 22).values()}) == 4
    runs = [RunFolder(tmp_path, name, "", {}, {}, {}, [], {}) for name in names]
    for run in runs:
        run.curves["train/loss"] = ([1, 2, 3], [3.0, 2.0, 1.0])
    fig = draw_losses(runs)
    draw(fig)
    assert len(fig.legends[0].get_texts()) == 3


def test_a_token_that_no_font_can_write_is_its_number(monkeypatch):
    monkeypatch.setattr(letters, "font_with", lambda letter: "" if letter.isascii() or letter == "␣" else None)
    assert letters.token({3: "论文", 4: " a论", 5: "the"}, 3, 9) == "#3"
    assert letters.token({3: "论文", 4: " a论", 5: "the"}, 4, 9) == "␣a□"
    assert letters.token({5: "x" * 20}, 5, 9) == "x" * 9


def test_the_fonts_of_the_machine_are_searched_once_for_all_letters(monkeypatch):
    """There may be hundreds, and a page of Chinese has as many letters."""
    letters.font_with.cache_clear()
    letters.font_with("\u3400")
    opened, get_font = [], letters.get_font
    monkeypatch.setattr(letters, "get_font", lambda path: opened.append(path) or get_font(path))
    letters.font_with("\u3401")
    assert len(opened) <= 2  # of pictures


def test_letters_take_the_places_that_they_need():
    assert (letters.columns("ab"), letters.columns("论文"), letters.columns("e\u0301")) == (2, 4, 1)
    assert [letters.columns(piece) for piece in _pieces("论" * 40)] == [62, 18]
    assert _pieces("a\n\nb") == ["a", "\n", "\n", "b"]
    assert _drawable("a\tb\n\x07") == "a  b\n□"


def test_any_name_is_drawn_in_bars_lines_and_rows(draw):
    for name in ODD:
        shares, spread = {name: {0: np.array([0.5, 0.5])}}, {name: {0: np.full((2, 2), np.nan)}}
        said = draw(share_panels(shares, spread, [0], "Shares"))
        assert letters.plain(name, 22) in said
        said = draw(draw_by_confidence({f"replay {name}.npz": np.ones(5)}))
        assert letters.plain(f"replay {name}.npz") in said


@pytest.mark.parametrize("name", [ODD[0], ODD[1], "a_run_of_a_very_long_name_" * 6])
def test_any_runs_name_is_in_the_legend_of_its_curves(draw, tmp_path, name):
    runs = [RunFolder(tmp_path, of, "", {}, {}, {}, [], {}) for of in (name, "other")]
    for run in runs:
        run.curves["train/loss"] = ([1, 2, 3], [3.0, 2.0, 1.0])
    fig = draw_losses(runs)
    assert f"{letters.plain(name, 40)}: train" in draw(fig)
    assert max(text.get_window_extent().x1 for text in fig.legends[0].get_texts()) <= fig.bbox.x1


def test_one_layer_is_marked_as_a_layer(draw):
    fig = drawing.new_figure(4, 3, "One layer")
    ax = fig.subplots()
    drawing.depth_line(ax, {3: 0.5}, drawing.INK, "a")
    draw(fig)
    assert seen(ax.xaxis) == ["3"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((2.0, 6.0), "2 3 4 5 6"), ((0.4, 30.0), "0.5 1 2 5 10 20"), ((5e-7, 2.0), "1e-06 1e-05 0.0001 0.001 0.01 0.1 1")],
)
def test_logarithmic_ticks_are_plain_numbers(draw, limits, expected):
    fig = drawing.new_figure(4, 3, "Logarithmic")
    ax = fig.subplots()
    ax.set_yscale("log")
    ax.set_ylim(*limits)
    drawing.log_ticks(ax.yaxis)
    draw(fig)
    assert seen(ax.yaxis) == expected.split()
