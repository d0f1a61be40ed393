"""Names of the array types that compiled code takes, and how it is compiled."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Records = Any  # np.recarray, one record a request or an engine

# No look at every divisor: none is 0. No counting of references to arrays, which took three quarters of the
# time: the caller holds them all, and compiled code makes none.
compiled = njit(error_model="numpy", _nrt=False)
