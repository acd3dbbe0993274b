"""The probes of routing on a model: padding, dense layers, layers of different widths, files."""

import numpy as np
import pytest
from probe_cases import all_needs, probe

from moebed.views.layer import LayerView
from moebed.views.live import walk
from probes.figures.drawing import to_rgb
from probes.registry import PROBES
from probes.running import store

NAMES = ("balance", "routing", "domain_share", "repeats", "coactivation", "vocabulary", "saturation")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_tells_what_the_run_told(make_decoder, text, tmp_path, name):
    decoder = make_decoder(num_hidden_layers=5, num_experts=[0, 4, 6, 1, 20], num_experts_per_tok=[0, 2, 3, 1, 1])
    result = probe(walk(decoder, text, all_needs()), name)[name]
    layers = {int(key.split("/")[1]) for key in result.arrays if "/" in key}
    assert layers == {1, 2, 3, 4} or name == "vocabulary"  # 25 tokens: no id is seen often
    store.save_arrays(tmp_path, name, result.arrays)
    loaded = PROBES[name].describe(store.load_arrays(tmp_path, name))
    assert loaded.scalars == result.scalars
    assert loaded.headlines == result.headlines
    assert loaded.notes == result.notes
    assert loaded.figures.keys() == result.figures.keys()
    for build in loaded.pages.values():
        assert len(build()) > 100
    assert all(np.isfinite(headline.value) for headline in result.headlines.values())


@pytest.mark.parametrize("name", ["domain_share", "repeats", "coactivation"])
def test_pictures_of_unlike_layers(make_decoder, text, name):
    decoder = make_decoder(num_hidden_layers=4, num_experts=[0, 4, 1, 20], num_experts_per_tok=[0, 2, 1, 3])
    result = probe(walk(decoder, text, all_needs()), name)[name]
    assert to_rgb(next(iter(result.figures.values()))()).std() > 1


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_of_a_dense_model(name):
    result = probe([LayerView(0, 1, 0, 0, None)], name)[name]
    assert result.notes
    assert not result.figures
    assert not result.headlines


def test_padding_is_not_counted(make_decoder, text):
    decoder = make_decoder()
    found = probe(walk(decoder, text, all_needs()), "domain_share", "repeats")
    assert found["domain_share"].arrays["count_first/1"].sum(axis=1).tolist() == [10, 6, 9]
    assert found["repeats"].arrays["pairs/1"].tolist() == [9, 5, 8]
