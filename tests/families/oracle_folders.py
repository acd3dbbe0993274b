"""Where the tiny published-layout checkpoints lie."""

from pathlib import Path

ORACLES = Path(__file__).resolve().parents[2].parent / "shared" / "oracles"
