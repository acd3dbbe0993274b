"""GGUF files: a header that is checked before anything is believed of it, and weights that are unpacked as they are read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
