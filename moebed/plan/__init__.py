"""What a run will need, by arithmetic alone: parameters, memory of a rank, tokens, bytes sent (``--print_plan``).

May import ``moebed.parallel`` and what lies below.
"""
