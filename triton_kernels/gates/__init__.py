"""Gates that need no GPU: what the compiler makes of every kernel that ships, and the bytes that its launches move.

``compile`` makes machine code for an architecture without a device, ``sass`` and ``gcn`` read it, ``check`` holds it
to the gates, ``roofline`` counts the bytes and the time that they bound.
"""
