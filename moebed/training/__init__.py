"""Training: the LightningModule, what it is optimised by, and what happens around a step."""
