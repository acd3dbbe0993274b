"""The model: its config, the decoder and all that it is made of."""
