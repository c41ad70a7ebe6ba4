"""``python -m flora``: the command, where its script is not on the path."""

import runpy

runpy.run_module("flora_cli", run_name="__main__")
