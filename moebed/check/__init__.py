"""What a machine can do with moebed, learned in a quarter of an hour (``moebed check``).

May import ``moebed.study``, ``moebed.bench``, ``moebed.tasks`` and what lies below.
"""
