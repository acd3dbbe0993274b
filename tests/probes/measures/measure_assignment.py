"""Processor seconds of one pair's cosines and of their assignment, beside scipy's dense solver where asked for.

    OMP_NUM_THREADS=1 python -m tests.probes.measures.measure_assignment NEURONS HIDDEN KIND STRENGTH [dense]

KIND and STRENGTH as ``tests.probes.measures.test_probe_matching.neurons`` makes pairs: ``random 0``, ``correlated .1``,
``leaning 0``. Neurons are bf16, as of most checkpoints.
"""

import sys
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from moebed.machine.float32 import exact_products
from probes.measures.assignment import assign
from probes.measures.matching import cosines
from tests.probes.measures.test_probe_matching import neurons


def timed(what, work):
    """What ``work`` gives; says its seconds."""
    start = time.process_time()
    found = work()
    print(f"{what} {time.process_time() - start:.2f} s", flush=True)
    return found


def main(size, width, kind, strength, dense=False):
    """Measure one pair."""
    a, b = (matrix.bfloat16() for matrix in neurons(kind, size, width, strength, 0))
    norms = [torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32) for matrix in (a, b)]
    wide = a.float()
    with exact_products(is_bf16=True):
        similarity = timed("cosines", lambda: cosines(wide, b, *norms))
    every, numbers = np.arange(size), similarity.numpy()

    def total(permutation):
        return numbers[every, permutation].sum(dtype=np.float64)

    print(f"sum {total(timed('assignment', lambda: assign(similarity))):.9f}")
    if dense:
        cost = np.negative(numbers, dtype=np.float64)
        print(f"sum {total(timed('dense solver', lambda: linear_sum_assignment(cost)[1])):.9f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), "dense" in sys.argv[5:])
