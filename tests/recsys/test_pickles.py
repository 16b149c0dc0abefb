"""Pickled matrices and lists; what else a pickle asks for is refused before it happens."""

import copyreg
import os
import pickle
import sys
import types

import numpy as np
import pytest

from perilune.errors import DataError
from perilune.recsys.pickles import read_pickled_list, read_pickled_matrix


def dumped(form, state, module="scipy.sparse.csr", protocol=2):
    """A pickle of a class of that name, which need not exist where it is read."""
    kind = type(form, (), {"__module__": module})
    names = ["scipy", "scipy.sparse", module]
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[module], form, kind)
        found = kind()
        found.__dict__.update(state)
        return pickle.dumps(found, protocol)
    finally:
        for name, there in before.items():
            if there is None:
                del sys.modules[name]
            else:
                sys.modules[name] = there


def csr(**changes):
    state = {
        "_shape": (3, 4),
        "indptr": np.array([0, 2, 2, 4], np.int32),
        "indices": np.array([0, 3, 1, 2], np.int32),
        "data": np.array([1.0, 5.0, 0.0, 2.0]),
        "maxprint": 50,
    }
    return {**state, **changes}


def read(tmp_path, content):
    path = tmp_path / "trn_buy"
    path.write_bytes(content)
    return read_pickled_matrix(path)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("module", ["scipy.sparse.csr", "scipy.sparse._csr"])
def test_rows_columns_and_values_of_every_protocol(tmp_path, module, protocol):
    found = read(tmp_path, dumped("csr_matrix", csr(), module, protocol))
    assert found.shape == (3, 4)
    assert found.rows.tolist() == [0, 0, 2]  # one is stored as zero
    assert found.columns.tolist() == [0, 3, 2]
    assert found.values.tolist() == [1.0, 5.0, 2.0]


def test_other_formats_and_byte_orders(tmp_path):
    coo = {"_shape": (3, 4), "row": np.array([2, 0], ">i4"), "col": np.array([1, 3], ">i8"), "data": np.array([7, 8])}
    found = read(tmp_path, dumped("coo_matrix", coo, "scipy.sparse.coo"))
    assert (found.rows.tolist(), found.columns.tolist(), found.values.tolist()) == ([2, 0], [1, 3], [7, 8])
    newer = {"_shape": (3, 4), "coords": (coo["row"], coo["col"]), "data": coo["data"]}
    again = read(tmp_path, dumped("coo_array", newer, "scipy.sparse._coo"))
    assert again.rows.tolist() == [2, 0]
    turned = csr(_shape=(4, 3))
    found = read(tmp_path, dumped("csc_matrix", turned, "scipy.sparse.csc"))
    assert (found.rows.tolist(), found.columns.tolist()) == ([0, 3, 2], [0, 0, 2])


class Attack:
    """Would write a file where it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_a_malicious_pickle_runs_nothing(tmp_path):
    trap = tmp_path / "trap"
    for call in ((os.system, f"touch {trap}"), (eval, f"open({str(trap)!r}, 'w')"), (open, str(trap), "w")):
        for content in (pickle.dumps(Attack(*call)), dumped("csr_matrix", csr(data=Attack(*call)))):
            with pytest.raises(DataError, match=r"trn_buy: it asks for .* not read"):
                read(tmp_path, content)
    assert not trap.exists()


def test_it_neither_changes_the_reader_nor_makes_other_objects(tmp_path):
    good = dumped("csr_matrix", csr())
    for content, words in (
        (
            b"cscipy.sparse.csr\ncsr_matrix\n(N}S'form'\nS'other'\nstb.",
            "neither a matrix nor numbers",
        ),  # BUILD on a name
        (b"Psomewhere\n.", "an instruction PERSID"),
        (b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.", "an object of numpy.ndarray"),
        (b"(ios\nsystem\n.", "an instruction INST"),
        (b"\x80\x02\x82\x01.", "an instruction EXT1"),
        (b"(lp0\nS'x'\nR.", "calls what is no name"),
        (pickle.dumps(np.array([{}, None], object)), "array of object"),
        (pickle.dumps(copyreg.__newobj_ex__), "asks for copyreg"),
    ):
        with pytest.raises(DataError, match=words):
            read(tmp_path, content)
    assert read(tmp_path, good).shape == (3, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indices": np.array([0, 3, 1, 9])}, "a column number lies outside of its shape"),
        ({"indptr": np.array([0, 2, 1, 4])}, "indptr does not fit"),
        ({"indptr": np.array([0, 2, 4])}, "indptr does not fit"),
        ({"data": np.ones(3)}, "different lengths"),
        ({"_shape": (3, 4, 5)}, "its shape is"),
        ({"indices": [0, 1]}, "indices is an object of type list"),
    ],
)
def test_damaged_matrices_are_told(tmp_path, changes, words):
    with pytest.raises(DataError, match=f"trn_buy: the csr matrix in it is damaged .*{words}"):
        read(tmp_path, dumped("csr_matrix", csr(**changes)))


def test_what_is_no_pickle_or_no_matrix_is_told(tmp_path):
    for content in (b"", b"no pickle", dumped("csr_matrix", csr())[:-40]):
        with pytest.raises(DataError, match="no pickle that can be read"):
            read(tmp_path, content)
    with pytest.raises(DataError, match=r"holds an object of type list, where a scipy\.sparse matrix"):
        read(tmp_path, pickle.dumps([1]))
    with pytest.raises(DataError, match="No such file"):
        read_pickled_matrix(tmp_path / "other")


def test_lists_of_items(tmp_path):
    path = tmp_path / "tst_int"
    path.write_bytes(pickle.dumps([None, 3, np.int64(5), np.int32(0)], 2))
    assert read_pickled_list(path) == [None, 3, 5, 0]
    for wrong, words in ((["a"], "entry 0 is an object of type str"), ([1, 2.5], "entry 1"), ({}, "where a list")):
        path.write_bytes(pickle.dumps(wrong))
        with pytest.raises(DataError, match=words):
            read_pickled_list(path)
