"""The name that :mod:`flora.runs.merging` had before the packages; scripts that import it still work."""

import sys

from flora.runs import merging

sys.modules[__name__] = merging
