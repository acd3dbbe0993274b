"""Parts of a tag, under which a number is logged: ``layers/balance/cv/layer_07``."""

LAYERS = "layers"  # the first part of what is of one layer
TRAIN = "train"  # of a training step


def layer_tag(layer: int) -> str:
    """``layer_07``: sorts well in TensorBoard."""
    return f"layer_{layer:02d}"
