"""What OpenMP's spinning costs: a training step of the demo's size by GOMP_SPINCOUNT, quiet and beside busy processes.

Run by hand on Linux: python -m tests.training.measure_spinning. Each count has a process of its own; they take steps in
turn.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time

COUNTS = ("", "10000", "30000", "100000")  # not set: libgomp's own 300 000
PLAN = ((0, 3, 11), (2, 2, 6), (4, 2, 6))  # busy processes, steps a turn, rounds


def work():
    """Take as many steps as each line of standard input says, and answer with the seconds of one."""
    import torch

    from moebed.bench.train import SIZES, own_step
    from moebed.machine.allocator import keep_freed_memory
    from moebed.machine.precision import choose_precision

    keep_freed_memory()
    size = SIZES["A"]
    step = own_step(size.model, torch.device("cpu"), False, choose_precision("cpu").precision)
    ids = torch.randint(size.model.vocab_size, (size.batch_size, size.sequence_length))
    for line in itertools.chain("2", iter(sys.stdin.readline, "")):
        begin = time.perf_counter()
        for _ in range(int(line)):
            step(ids, ids)
        print((time.perf_counter() - begin) / int(line), flush=True)


def measure():
    """A line for each count and number of busy processes."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "tests.training.measure_spinning", "work"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(command, env={**clean, **({"GOMP_SPINCOUNT": count} if count else {})}, **pipes)
        for count in COUNTS
    ]
    busy = []
    try:
        for process in running:
            process.stdout.readline()
        for others, steps, rounds in PLAN:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            seconds = {count: [] for count in COUNTS}
            for turn in range(rounds):
                for place in range(len(COUNTS)):
                    place = (place + turn) % len(COUNTS)
                    running[place].stdin.write(f"{steps}\n")
                    running[place].stdin.flush()
                    seconds[COUNTS[place]].append(float(running[place].stdout.readline()))
            for process in busy:
                process.kill()
            for count, found in seconds.items():
                speed = sorted(base / own for base, own in zip(seconds[""], found, strict=True))
                print(
                    f"{others} busy, count {count or 'not set'}: {1e3 * statistics.median(found):.0f} ms a step, speed "
                    f"over not set {statistics.median(speed):.2f} [{speed[0]:.2f}, {speed[-1]:.2f}]",
                    flush=True,
                )
    finally:
        for process in (*busy, *running):
            process.kill()


if __name__ == "__main__":
    work() if "work" in sys.argv else measure()
