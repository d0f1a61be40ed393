"""Names of the array types that compiled code takes, and how it is compiled."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Records = Any  # np.recarray, one record a request or an engine

compiled = njit(error_model="numpy")  # no look at every divisor; none is 0
