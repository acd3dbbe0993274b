"""What a probe sees: views of layers, text on its way through a model, the walk over a live one."""
