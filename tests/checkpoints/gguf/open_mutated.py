"""Open many mutated copies of a file in this process, and print what became of them, and the memory that it took.

python tests/checkpoints/gguf/open_mutated.py FILE FOLDER COUNT
"""

import json
import random
import resource
import struct
import sys
from itertools import accumulate
from pathlib import Path

import gguf

from moebed.checkpoints.checkpoint import Checkpoint
from moebed.errors import UserError

# Numbers that are hard to believe.
HARD = {"<I": (0, 1, 255, 2**16, 2**31, 2**32 - 1), "<Q": (0, 1, 2**20, 2**32, 2**40, 2**63, 2**64 - 1)}


def mutated(content, places, generator):
    """A file's bytes with some of its header's numbers replaced by ones that are hard to believe."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        place = generator.choice(places) if generator.random() < 0.7 else generator.randrange(4, places[-1])
        form = generator.choice(["bit", "cut", "<I", "<I", "<Q", "<Q"])
        if form == "bit":
            changed[place] ^= 1 << generator.randrange(8)
        elif form == "cut":
            del changed[place : place + generator.randrange(1, 9)]
        else:
            struct.pack_into(form, changed, place, generator.choice(HARD[form]))
    return bytes(changed)


def places_of(path):
    """Where a header has its counts, lengths, types and offsets, by the gguf package's reading of it."""
    reader = gguf.GGUFReader(path)
    found = [4, 8, 16]  # version, tensors, keys
    for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
        ends = [field.offset, *accumulate((part.nbytes for part in field.parts), initial=field.offset)]
        found += [place for place in ends if place]  # what the reader makes up itself lies nowhere
    return sorted(set(found))


def peak():
    """Most bytes that were resident at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    Checkpoint.open(source)
    content, places, generator = source.read_bytes(), places_of(source), random.Random(5)
    before, opened, refused, strange = peak(), 0, 0, []
    for number in range(count):
        path = folder / f"mutated-{number}.gguf"
        path.write_bytes(mutated(content, places, generator))
        try:
            Checkpoint.open(path)
            opened += 1
        except UserError as error:
            refused += 1
            if "\n" in str(error) or "mutated-" not in str(error):
                strange.append(str(error))
        except Exception as error:  # noqa: BLE001  that is what is looked for
            strange.append(repr(error))
    print(json.dumps({"opened": opened, "refused": refused, "strange": strange, "grown": peak() - before}))
