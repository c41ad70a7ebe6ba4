"""The name that :mod:`flora.convert.streaming` had in 0.1.0; scripts that import it still work."""

from flora.convert.streaming import stream_merged as merge

__all__ = ["merge"]
