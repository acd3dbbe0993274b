"""The Probe contract: look at layer views, give back named arrays.

Everything else (scalars, headlines, pictures) is a pure function of those arrays, so that a report draws the same from
a file as a training run does from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from moebed.model.config import ModelConfig
from moebed.views.layer import ExpertView, HeadView, LayerView, Need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Headline:
    """One number that answers a probe's question, and the sentence that says so.

    Args:
        value: The number.
        sentence: What it says.
        interval: 95 %, of what the number would be of endlessly many texts of the kind
        (``probes.measures.resampling``).
        no_interval: Why it has none however many texts there are, in words; empty where only too few can be why, and
            where no text enters.
    """

    value: float
    sentence: str
    interval: tuple[float, float] | None = None
    no_interval: str = ""


@dataclass
class ProbeResult:
    """What a probe found.

    Args:
        arrays: ``<key>/<layer>[/<matrix>]`` -> array; what is stored in ``results/<probe>.npz``.
        scalars: ``<quantity>/layer_07`` or ``<quantity>`` -> number; TensorBoard's tag adds ``probes/<probe>/``.
        headlines: The few numbers a person asks for first, by name.
        figures: Name -> function that draws it; nothing is drawn until it is called.
        notes: What was left out, and why.
        pages: Name -> function that writes a self-contained piece of HTML, for what is read rather than looked at.
    """

    arrays: Arrays
    scalars: dict[str, float] = field(default_factory=dict)
    headlines: dict[str, Headline] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pages: Mapping[str, Callable[[], str]] = field(default_factory=dict)


class Probe:
    """One analysis. It sees layer views in order, no Trainer, no path, no logger.

    A driver calls, for each layer that has experts, ``update_matrix`` for each of the three matrices (only where the
    probe needs weights), ``update_activations`` and ``update_expert`` for each expert (only where it needs them); then,
    for every layer, ``update``; after the last one ``update_head`` (only where it needs predictions); at the end
    ``compute`` once. One object serves one pass.

    Between two layers a probe's state is its ``arrays``: ``<key>/<layer>[/<part>]``, and of no layer what is the same
    whichever layers it was shown. Nothing else is kept when a pass over a checkpoint is stopped, and layers that were
    finished then are not shown again.

    A probe that compares what other probes found names them in ``sources``; it is given their arrays before ``compute``
    and runs after them. Those of ``optional_sources`` it is given only where they run as well.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    sources: ClassVar[tuple[str, ...]] = ()
    optional_sources: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """About how many bytes it stores of each token at a layer with experts, or of what is predicted for it (None).

        Of what grows with the experts or the vocabulary alone: that is what fills disks, and is known before any work.
        """
        return 0

    def begin(self, step: int, earlier: Arrays) -> None:
        """Before a pass in training: the optimizer step, and the arrays that this probe stored at the probing before.

        A probe that follows something over training takes over what it needs of the steps before ``step``; a run that
        was resumed may have left later ones.
        """

    def update_matrix(self, view: LayerView, name: str) -> None:
        """See one of the three matrices (``up``, ``gate``, ``down``) of a layer's experts, and of no other for now.

        A streamed layer holds one of the three at a time, so whatever compares weights does it here.
        """

    def update_activations(self, view: LayerView, expert: int, tokens: slice, activations: Tensor) -> None:
        """See the activations (t, F) of one expert for some tokens, before its ``update_expert``.

        Of a long text they are too many to be held at a time.
        """

    def update_expert(self, view: LayerView, expert: ExpertView) -> None:
        """See what one expert made of every token of a layer."""

    def update(self, view: LayerView) -> None:
        """See one layer; store its arrays. Layers without experts come too."""

    def update_head(self, head: HeadView) -> None:
        """See what the model predicted in the end."""

    def derive(self, found: Mapping[str, Arrays]) -> None:
        """Store arrays that follow from those of the sources, given by probe."""

    def forget(self, layer: int) -> None:
        """Drop what is stored of a layer, some of whose weights turned out to be unreadable."""
        for key in [key for key in self.arrays if layer_of(key) == layer]:
            del self.arrays[key]

    def compute(self) -> ProbeResult:
        """The result over all layers seen."""
        return self.describe(self.arrays)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Scalars, headlines and figures of stored arrays."""
        return ProbeResult(arrays)


def layer_tag(layer: int) -> str:
    """``layer_07``: sorts well in TensorBoard."""
    return f"layer_{layer:02d}"


def layer_of(key: str) -> int | None:
    """The layer that an array ``<key>/<layer>[/<part>]`` is of; None for those of no layer."""
    _, _, rest = key.partition("/")
    layer = rest.partition("/")[0]
    return int(layer) if layer.isdecimal() else None


def by_layer(arrays: Arrays, key: str) -> dict[int, np.ndarray]:
    """The arrays ``<key>/<layer>`` by layer, in order."""
    found = {int(name.split("/")[1]): value for name, value in arrays.items() if name.split("/")[0] == key}
    return dict(sorted(found.items()))


def per_layer(quantity: str, values: Mapping[int, float]) -> dict[str, float]:
    """Scalars ``<quantity>/layer_07`` of each layer, and their mean over layers as ``<quantity>``; none from none."""
    scalars = {f"{quantity}/{layer_tag(layer)}": float(value) for layer, value in values.items()}
    if scalars:
        scalars[quantity] = sum(scalars.values()) / len(scalars)
    return scalars
