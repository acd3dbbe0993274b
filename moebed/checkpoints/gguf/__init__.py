"""GGUF files: headers that are checked before they are believed, and weights that are unpacked as they are read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
