"""A spec that cannot be is refused where it is written, with what to write."""

from __future__ import annotations

import numpy as np
import pytest
from support.errors import one_line

from stca.errors import UsageError
from stca.specs import TensorSpec

GOOD = {"name": "hist", "dtype": "int64", "shape": ("N_h",), "scope": "user"}
WRONG = [
    ({"name": None}, ("None", "text")),
    ({"name": ""}, ("text",)),
    ({"dtype": "long"}, ("'hist'", "'long'", 'write "int64"')),
    ({"dtype": "torch.int32"}, ('write "int32"',)),
    ({"dtype": "Float32"}, ('write "float32"',)),
    ({"dtype": "double"}, ('write "float64"',)),
    ({"dtype": np.float32}, ('write "float32"',)),
    ({"dtype": np.dtype("uint8")}, ('write "uint8"',)),
    ({"dtype": int}, ('write "int64"',)),
    ({"dtype": "complex64"}, ("expected one of", "float16")),
    ({"dtype": []}, ("dtype", "expected one of")),
    ({"dtype": "bfloat16"}, ("bfloat16", "float32", "cast it in the model")),
    ({"shape": ["N_h"]}, ("['N_h']", "tuple")),
    ({"shape": "N_h"}, ("write a tuple, ('N_h',)",)),
    ({"shape": 50}, ("write a tuple, (50,)",)),
    ({"shape": (-1, 50)}, ("(-1, 50)", '("N_h", 64)')),
    ({"shape": (None,)}, ("(None,)", '("N_h", 64)')),
    ({"shape": ("N_h", "")}, ("tuple",)),
    ({"scope": "users"}, ("'users'", "did you mean 'user'?", "target (one for each)")),
    ({"scope": "item"}, ("'item'", "expected one of", "target (one for each)")),
    ({"scope": 3}, ("scope 3",)),
    ({"limit": "9"}, ("limit", "'9'", "from 1")),
    ({"limit": 0}, ("limit 0", "from 1")),
    ({"limit": True}, ("limit True", "from 1")),
    ({"limit": 5, "dtype": "float32"}, ("float32", "limit", "leave the limit out")),
    ({"low": 0.5}, ("low", "0.5", "integer")),
    ({"low": 7, "limit": 7}, ("from 7 and below 7", "raise the limit")),
    ({"length_of": 3}, ("length_of", "3")),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_a_wrong_field(fields, words):
    with one_line(UsageError, *words):
        TensorSpec(**{**GOOD, **fields})


def test_what_is_right():
    for fields in ({}, {"limit": 9, "low": -1}, {"shape": ()}, {"dtype": "bool"}, {"blank": 0}):
        assert TensorSpec(**{**GOOD, **fields}).name == "hist"
