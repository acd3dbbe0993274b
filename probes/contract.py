"""The Probe contract: look at layer views, give back named arrays.

Everything else (scalars, headlines, pictures) is a pure function of those arrays, so that a report draws the same from
a file as a training run does from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from moebed.errors import ConfigError
from moebed.machine.tags import layer_tag
from moebed.model.config import ModelConfig
from moebed.views.interventions import Intervention
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
        no_interval: Why it has none, in words; empty where only a single text can be why, and where no text enters.
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
        scalars: ``<quantity>/layer_07`` or ``<quantity>`` -> number; how they are logged is in ``probes.running.tags``.
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


def require_result(found: object, name: str) -> None:
    """Raise ConfigError where what a probe of that name describes cannot be kept, shown and drawn."""
    if not isinstance(found, ProbeResult):
        raise ConfigError(f"probe {name}: describe gives a {type(found).__name__}; it must return a ProbeResult")
    parts: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("scalars", lambda value: isinstance(value, int | float | np.number), "a number"),
        ("headlines", lambda value: isinstance(value, Headline), "a Headline"),
        ("figures", callable, "a function that draws it"),
        ("pages", callable, "a function that writes it"),
    )
    for part, fits, wanted in parts:
        given = getattr(found, part)
        if not isinstance(given, Mapping):
            raise ConfigError(f"probe {name}: {part} is of type {type(given).__name__}; it must have each by its name")
        for key, value in given.items():
            if not fits(value):
                raise ConfigError(
                    f"probe {name}: {part} has {key!r} of type {type(value).__name__}; it must be {wanted}"
                )


@dataclass(frozen=True)
class ProbeOptions:
    """What one probe can be told: one that can be told something has its own as ``Options``; every field has a default.

    Raises ConfigError where a value is not of its default's kind.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value, default = getattr(self, one.name), one.default
            kinds = (int, float) if type(default) is float else (type(default),)
            if type(value) not in kinds:
                raise ConfigError(f"probes: {one.name} is {value!r}; it must be such as {default!r}")


class Probe:
    """One analysis. It sees layer views in order, no Trainer, no path, no logger.

    A driver calls, for each layer, ``begin_layer``; where the layer has experts, ``update_matrix`` for each of the
    three matrices (only where the probe needs weights), ``update_activations`` and ``update_expert`` for each expert
    (only where it needs them); then ``update``. After the last layer comes ``update_head`` (only where the probe needs
    predictions), and at the end ``compute``, once. One object serves one pass.

    What is kept is ``arrays``, and nothing else:

    - Arrays of a layer, as ``put`` names them, are written when it is finished, and those of ``update_head`` after it.
      A pass that was stopped goes on from them: it shows none of these again, other attributes are as ``__init__``
      leaves them, and ``derive`` and ``compute`` run anew.
    - Common arrays, of no layer, must be the same whichever layers the probe was shown: a pass that goes on shows some.
    - Of a layer that cannot be read to its end nothing stays: ``forget`` drops its arrays. The layer after it begins
      with ``begin_layer``, which is where to set up what serves one layer alone.

    A probe that compares what other probes found names them in ``sources``; it is given their arrays before ``compute``
    and runs after them. Those of ``optional_sources`` it is given only where they run as well.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    wants: ClassVar[frozenset[Need]] = frozenset()  # what it looks at as well, where it is there
    sources: ClassVar[tuple[str, ...]] = ()
    optional_sources: ClassVar[tuple[str, ...]] = ()
    # Its settings, and what they are in this pass. What ``describe`` needs of them is stored.
    Options: ClassVar[type[ProbeOptions]] = ProbeOptions
    options: ProbeOptions = ProbeOptions()

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.options = self.Options()

    def put(self, key: str, layer: int | None, value: Tensor | np.ndarray | float, part: str = "") -> None:
        """Store an array or a number of a layer, or of none, and of a part of it; float64 is stored as float32."""
        array = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        self.arrays[str(ArrayName(key, layer, part))] = array.astype(np.float32) if array.dtype == np.float64 else array

    def drop(self, key: str) -> None:
        """Drop the arrays of a key, of all layers: what was kept for ``compute`` alone."""
        self.arrays = {name: array for name, array in self.arrays.items() if ArrayName.of(name).key != key}

    @classmethod
    def token_bytes(cls, config: ModelConfig, layer: int | None) -> int:
        """About how many bytes it stores of each token at a layer with experts, or of what is predicted for it (None).

        Of what grows with the experts or the vocabulary alone: that is what fills disks, and is known before any work.
        """
        return 0

    def interventions(self, config: ModelConfig) -> Sequence[Intervention]:
        """Those whose effects it will ask for in ``update_head``, of ``head.under``, as far as they are known before.

        In a pass over a checkpoint they go through the layers beside the text; others take passes of their own.
        """
        return ()

    def begin(self, step: int, earlier: Arrays, name: str = "") -> None:
        """Before a pass in training: the optimizer step, and the arrays that this probe stored at the probing before.

        A probe that follows something over training takes over what it needs of the steps before ``step``; a run that
        was resumed may have left later ones. Of checkpoints that are given in order, ``step`` is the place and ``name``
        what this one is called.
        """

    def begin_layer(self, view: LayerView) -> None:
        """Set up what serves this layer alone, whatever the layer before has left; nothing of it was looked at yet."""

    def update_matrix(self, view: LayerView, name: str) -> None:
        """See one of the three matrices (``up``, ``gate``, ``down``) of a layer's experts, and of no other for now.

        A streamed layer holds one of the three at a time, so whatever compares weights does it here.
        """

    def update_activations(self, view: LayerView, expert: int, tokens: slice, activations: Tensor) -> None:
        """See the activations (t, F) of one routed expert for some tokens, before its ``update_expert``.

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
        self.arrays = {name: array for name, array in self.arrays.items() if ArrayName.of(name).layer != layer}

    def compute(self) -> ProbeResult:
        """The result over all layers seen."""
        return self.describe(self.arrays)

    @classmethod
    def describe(cls, arrays: Arrays) -> ProbeResult:
        """Scalars, headlines and figures of stored arrays."""
        return ProbeResult(arrays)


class ArrayName(NamedTuple):
    """``<key>[/<layer>[/<part>]]``: the name under which an array is stored; ``str`` writes it, ``of`` reads it."""

    key: str
    layer: int | None = None
    part: str = ""

    def __str__(self) -> str:
        layer = "" if self.layer is None else str(self.layer)
        return "/".join(piece for piece in (self.key, layer, self.part) if piece)

    @classmethod
    def of(cls, name: str) -> ArrayName:
        """A stored name, taken apart."""
        key, _, rest = name.partition("/")
        layer, _, part = rest.partition("/")
        return cls(key, int(layer), part) if layer.isdecimal() else cls(key, None, rest)


def by_part(arrays: Arrays, key: str) -> dict[str, dict[int, np.ndarray]]:
    """The arrays ``<key>/<layer>/<part>`` by part (a matrix, say, or a domain) and layer, the layers in order."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, value in arrays.items():
        if not name.startswith(key):  # most of them, and a probe may have hundreds
            continue
        at = ArrayName.of(name)
        if at.key == key and at.layer is not None:
            found.setdefault(at.part, {})[at.layer] = value
    return {part: dict(sorted(layers.items())) for part, layers in found.items()}


def by_layer(arrays: Arrays, key: str, part: str = "") -> dict[int, np.ndarray]:
    """The arrays ``<key>/<layer>[/<part>]`` by layer, in order."""
    return by_part(arrays, key).get(part, {})


def find(arrays: Arrays, key: str, layer: int, part: str = "") -> np.ndarray | None:
    """The array ``<key>/<layer>[/<part>]``; None if there is none."""
    return arrays.get(str(ArrayName(key, layer, part)))


def numbers(arrays: Arrays, key: str, part: str = "") -> dict[int, float]:
    """The numbers ``<key>/<layer>[/<part>]`` by layer, in order; raises ConfigError for an array that is none."""
    found = by_layer(arrays, key, part)
    for layer, value in found.items():
        if np.size(value) != 1:
            raise ConfigError(
                f"a probe put {key!r} of layer {layer} as an array of shape {np.shape(value)} where one number is "
                "read; put its mean, say, or read it by by_layer"
            )
    return {layer: float(value) for layer, value in found.items()}


def finite(values: Mapping[int, float]) -> dict[int, float]:
    """Those that are numbers."""
    return {layer: value for layer, value in values.items() if math.isfinite(value)}


def per_layer(quantity: str, values: Mapping[int, float]) -> dict[str, float]:
    """Scalars ``<quantity>/layer_07`` of each layer, and their mean over layers as ``<quantity>``; none from none."""
    scalars = {f"{quantity}/{layer_tag(layer)}": float(value) for layer, value in values.items()}
    if scalars:
        scalars[quantity] = sum(scalars.values()) / len(scalars)
    return scalars


def in_order(names: Iterable[str], known: Mapping[str, Probe | type[Probe]]) -> tuple[str, ...]:
    """Probes with all that they take their numbers from, each after those; optional sources come first, if they come.

    Raises:
        ConfigError: A source is not among the known ones, or probes take their numbers from one another.
    """
    waiting, wanted = list(names), dict[str, tuple[str, ...]]()
    for name in waiting:  # grows
        if name in wanted:
            continue
        wanted[name] = known[name].sources
        for source in wanted[name]:
            if source not in known:
                raise ConfigError(f"probes: {name} takes its numbers from {source!r}, which is no probe here")
        waiting.extend(wanted[name])
    graph = {
        name: [*sources, *(one for one in known[name].optional_sources if one in wanted)]
        for name, sources in wanted.items()
    }
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " and ".join(dict.fromkeys(error.args[1]))
        raise ConfigError(f"probes: {circle} take their numbers from one another") from None
