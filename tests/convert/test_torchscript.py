import pickle

import numpy as np
import pytest

from grain_jax.convert import torchscript


def test_a_tensor_is_read_by_its_strides():
    storage = np.arange(12, dtype=np.float32)
    found = torchscript._tensor(storage, 2, (2, 3), (1, 2))
    np.testing.assert_array_equal(found, [[2, 4, 6], [3, 5, 7]])


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (13,), (1,)),
        (3, (10,), (1,)),
        (-1, (2,), (1,)),
        (4, (2,), (-1,)),
        (0, (10**15,), (0,)),  # would ask for more memory than there is
    ],
)
def test_a_tensor_beyond_its_numbers_is_refused(offset, size, stride):
    with pytest.raises(pickle.UnpicklingError, match="reaches beyond its numbers"):
        torchscript._tensor(np.zeros(12, np.float32), offset, size, stride)
