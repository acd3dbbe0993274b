"""Interventions on a streamed checkpoint: the effects of a live model, whatever S; each weight once; memory counted."""

import pytest
import torch
from checkpoint_files import write
from test_pretrained_text import CASES, Reads, make_text

from moebed.checkpoints.pretrained import PretrainedMoE
from moebed.views.intervention_names import parse
from moebed.views.interventions import LayerContext
from moebed.views.layer import HeadView, Need
from moebed.views.live import LiveModel, ModuleWeights, _views, evaluating
from moebed.views.text_pass import Rows, TextPass

THREE = ("identity", "mask 2 refill @ layer 1", "random_set 5 @ layer 1")
MANY = (
    *THREE,
    "mask 0 zero",
    "mask 0,3 drop_norm @ layer 2",
    "keep 1,2,4",
    "keep_top 1 zero",
    "drop_top 1 refill @ layer 1",
    "force 4 @ layer 1",
    "shift 1,2 by -0.5",
    "swap",
)


@torch.no_grad()
def streamed(folder, text, names, needs=frozenset({Need.PREDICTIONS}), told=True, **options):
    model = PretrainedMoE(str(folder), text=text, **options)
    interventions = [parse(name) for name in names]
    model.prepare([], needs, interventions=interventions if told else ())
    try:
        for view in model.views(text, needs):
            if isinstance(view, HeadView):
                return view.under(interventions)
            if Need.OUTPUTS in needs and view.num_experts:
                list(view.experts())
    finally:
        model.close()


def by_continuing(decoder, text, intervention):
    """The reference, for an intervention at one layer: the layer's output under it, and on with the plain model."""
    model = LiveModel(decoder)
    with evaluating(decoder), torch.no_grad():
        run = TextPass(model, text)
        views = run.layers(_views(model, 0))
        (at,) = intervention.layers_of(decoder.config)
        for view in views:
            if view.index == at:
                mlp = decoder.layers[at].mlp
                routing = intervention.apply(view.routing, view.moe_input, LayerContext(at, mlp.router))
                (output,) = ModuleWeights(mlp).combine([Rows(view.moe_input, routing)])
                rest = run.continued(output)
                for _ in rest.layers(_views(model, at + 1)):
                    pass
        return rest.head().loss - run.head().loss


def by_the_router(decoder, text, intervention):
    """Another reference, for a text without padding: routers that decide otherwise, in the model's forward pass."""
    with torch.no_grad():
        losses = []
        for changed in (False, True):
            originals = {}
            for index in intervention.layers_of(decoder.config) if changed else ():
                router = decoder.layers[index].mlp.router
                originals[index] = router.forward

                def forward(x, experts, context=None, at=index, router=router):
                    return intervention.apply(originals[at](x, experts, context), x, LayerContext(at, router))

                router.forward = forward
            logits = decoder(text.input_ids).logits[text.token_mask]
            for index in originals:
                del decoder.layers[index].mlp.router.forward
            targets = text.targets
            loss = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
            losses.append(loss.masked_fill(targets < 0, torch.nan))
        return losses[1] - losses[0]


@pytest.mark.parametrize("needs", [{Need.PREDICTIONS}, {Need.PREDICTIONS, Need.OUTPUTS}], ids=["chosen", "every"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("no experts", "one expert")])
def test_three_in_one_pass_are_three_live_ones(case, needs, tmp_path):
    decoder, text = write(tmp_path, **CASES[case]), make_text(9, 4, 1, 12)
    names = [name for name in THREE if name != "identity"]
    found = streamed(tmp_path, text, THREE, frozenset(needs))
    for name in names:
        wanted = by_continuing(decoder, text, parse(name))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5, equal_nan=True)
        assert float(wanted.nan_to_num().abs().max()) > 1e-3  # or nothing would have been compared
    assert float(found["identity"].nan_to_num().abs().max()) < 1e-5


@pytest.mark.parametrize("case", ["fp32", "shared, a dense layer", "tied"])
def test_all_kinds_are_what_other_routers_would_have_done(case, tmp_path):
    decoder, text = write(tmp_path, **CASES[case]), make_text(12, 12, 12)
    found = streamed(tmp_path, text, MANY)
    for name in MANY:
        wanted = by_the_router(decoder, text, parse(name))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("probed", [False, True])
def test_each_weight_is_read_once_whatever_s(probed, tmp_path, monkeypatch):
    write(tmp_path, num_experts_per_tok=2)
    reads, text = Reads(monkeypatch), make_text(20, 30)
    needs = {Need.PREDICTIONS, Need.OUTPUTS} if probed else {Need.PREDICTIONS}
    assert len(streamed(tmp_path, text, MANY, frozenset(needs))) == len(MANY)
    assert set(reads.values()) == {1}
