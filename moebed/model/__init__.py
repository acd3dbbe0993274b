"""The model: its config, the decoder and all that it is made of, routers and experts included.

It knows no file, no Trainer and no probe. May import ``moebed.machine`` and what lies below.
"""
