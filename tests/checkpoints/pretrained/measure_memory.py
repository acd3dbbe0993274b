"""Run `moebed probe` and print, as the last line, how much memory it took, in bytes.

Peak resident, mapped files included; peak without those; and the latter of the walk alone, before pictures are drawn.

python tests/checkpoints/pretrained/measure_memory.py CHECKPOINT --out DIR [options of moebed probe]
"""

import json
import sys
import threading
import time

from moebed.cli import main


def status() -> dict[str, int]:
    """Fields of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        rows = [line.split() for line in file if line.startswith(("Vm", "Rss"))]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


class Watch(threading.Thread):
    """Samples what is resident and not mapped from a file: the kernel keeps a peak of the sum alone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous, self.at_start = 0, 0

    def run(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, status()["RssAnon"])
            time.sleep(0.02)


if __name__ == "__main__":
    from probes.running.checkpoint_pass import CheckpointPass

    watch = Watch()
    watch.start()
    walked, results = [], CheckpointPass.results

    def note_peak(self):
        walked.append(watch.anonymous)
        return results(self)

    CheckpointPass.results = note_peak  # type: ignore[method-assign]
    code = main(["probe", *sys.argv[1:]])
    found = status()
    print(
        json.dumps(
            {"exit": code, "peak_resident": found["VmHWM"], "peak_anonymous": watch.anonymous, "walk": walked[0]}
        )
    )
