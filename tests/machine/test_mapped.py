"""Large arrays in files: those of an archive without reading it, and new ones that take no memory."""

import zipfile

import numpy as np
import pytest

from moebed.machine import storage
from moebed.machine.mapped import LARGE, checksums, mapped_arrays, new_array

ARRAYS = {
    "large/0": np.arange(50_000, dtype=np.float32).reshape(100, 500),
    "fortran/1": np.asfortranarray(np.arange(40_000.0).reshape(200, 200)),
    "words": np.array([f"word {i}" for i in range(5000)]),
    "small/0": np.arange(5),
    "none": np.zeros((0, 4)),
}


def test_large_arrays_are_those_of_the_file(tmp_path):
    path = storage.write_arrays(tmp_path / "a.npz", ARRAYS, note="a note", compressed=False)
    found = mapped_arrays(path, check=True)
    assert set(found) == {name for name, array in ARRAYS.items() if array.nbytes >= LARGE} == {*list(ARRAYS)[:3]}
    path.unlink()
    for name, array in found.items():
        assert isinstance(array, np.memmap)
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.flags.f_contiguous == ARRAYS[name].flags.f_contiguous
    again = storage.write_arrays(tmp_path / "b.npz", ARRAYS | found, note="a note", compressed=False)
    assert again.read_bytes() == storage.write_arrays(path, ARRAYS, note="a note", compressed=False).read_bytes()


def test_only_small_arrays_are_compressed_and_what_is_damaged_is_noticed(tmp_path):
    small = {f"zeros/{i}": np.zeros(LARGE // 8 - 1) for i in range(4)}
    path = storage.write_arrays(tmp_path / "c.npz", ARRAYS | small)
    assert set(mapped_arrays(path)) == set(checksums(path)) == {*list(ARRAYS)[:3]}
    assert set(mapped_arrays(path, only=["words", "small/0"])) == {"words"}
    assert path.stat().st_size < sum(array.nbytes for array in ARRAYS.values()) + LARGE
    path = storage.write_arrays(tmp_path / "d.npz", ARRAYS, compressed=False)
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile):
        mapped_arrays(path, check=True)


def test_a_new_large_array_is_in_a_file_without_a_name(tmp_path):
    folder = tmp_path / "scratch"
    assert not isinstance(new_array((10, 10), np.dtype(np.float32), folder), np.memmap)
    assert not isinstance(new_array((10_000, 1000), np.dtype(np.float32), None), np.memmap)
    array = new_array((10_000, 1000), np.dtype(np.float32), folder)
    assert isinstance(array, np.memmap)
    array[:, 7] = 3
    assert (array[5, 7], array[5, 8]) == (3, 0)
    assert list(folder.iterdir()) == []
