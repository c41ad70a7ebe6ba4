"""The name that :mod:`flora.convert.streaming` had before the packages; scripts that import it still work."""

from flora.convert.streaming import stream_merged as merge

__all__ = ["merge"]
