"""What the machine beneath is and keeps: files, the terminal, types of numbers, memory, signals.

May import ``triton_kernels``, ``moebed``'s own modules and what lies below.
"""
