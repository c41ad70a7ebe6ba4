"""Modules under the names that they had in 0.1.0.

Python looks for ``flora.NAME`` in this folder too (``__path__`` in ``flora/__init__.py``). An adapter that was saved on
the 3-D U-Net names ``flora.volume_unet``, which ``AutoPeftModel`` imports; a script may import ``flora.merging``.
"""
