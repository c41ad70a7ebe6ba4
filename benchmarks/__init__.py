"""Benchmarks: one script per question, a JSON per run, and the page that is generated from them (``run.py``)."""
