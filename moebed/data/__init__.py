"""Text and batches of it: sources, tokenizers, tokens on disk, loaders that go on at the very sample.

May import ``moebed.model`` and what lies below.
"""
