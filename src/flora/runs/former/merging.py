"""The name that :mod:`flora.runs.merging` had in 0.1.0."""

import sys

from flora.runs import merging

sys.modules[__name__] = merging
