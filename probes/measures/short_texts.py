"""Short texts, whose tokens can be pictured one by one: their ids, and what they say.

T tokens.
"""

from __future__ import annotations

import numpy as np

from moebed.views.layer import LayerView
from probes.contract import Arrays

PICTURED_TOKENS = 12
_LONGEST = 12  # letters of a token that fit above a panel


def keep_tokens(arrays: dict[str, np.ndarray], view: LayerView, limit: int = PICTURED_TOKENS) -> bool:
    """Store ``token_ids (T,)`` and, where known, ``token_text (T,)``, once; False where there are more than ``limit``.

    Args:
        arrays: A probe's arrays.
        view: A layer that has seen the text.
        limit: The most tokens.
    """
    assert view.routing is not None
    if len(view.routing.topk_index) > limit:
        return False
    if view.text is not None and "token_ids" not in arrays:
        arrays["token_ids"] = view.text.token_ids.cpu().numpy()
        if view.text.token_text:
            arrays["token_text"] = np.asarray(view.text.token_text)
    return True


def token_names(arrays: Arrays, count: int) -> list[str]:
    """What to call the tokens in a picture: what they say, else their ids, else their positions."""
    if "token_text" in arrays:
        return [_readable(str(text)) for text in arrays["token_text"]]
    if "token_ids" in arrays:
        return [f"id {number}" for number in arrays["token_ids"]]
    return [f"token {number}" for number in range(count)]


def _readable(text: str) -> str:
    """A token on one line: no spaces around it, line ends visible."""
    text = text.replace("\u2581", " ").replace("\u0120", " ").replace("\n", "\u21b5").replace("\t", "\u2192")
    text = text.strip() or "(space)"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\u2026"
