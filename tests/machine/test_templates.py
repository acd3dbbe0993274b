"""Templates: what fills them is text, all of it is there, and every one comes along when the packages are installed."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from moebed.machine.templates import render

ROOT = Path(__file__).resolve().parents[2]
LAW = {"sentences": ["a < b"], "notes": [], "pictures": {}, "tables": []}


def test_values_are_escaped_and_html_of_another_template_is_not():
    page = render("moebed.laws/section.html", about=Markup("<i>x</i>"), **LAW)
    assert "<li>a &lt; b</li>" in page
    assert "<i>x</i>" in page


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="about"):
        render("moebed.laws/section.html", **LAW)


def test_every_template_is_package_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]
    found = [path for package in ("moebed", "probes") for path in (ROOT / package).rglob("templates/*")]
    assert found
    for path in found:
        package = ".".join(path.parents[1].relative_to(ROOT).parts)
        assert any(fnmatch(f"templates/{path.name}", pattern) for pattern in patterns[package]), path
