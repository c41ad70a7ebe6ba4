"""The comparison on real data: a recipe and a config for each task, run by ``flora compare``.

``flora compare benchmarks/quality/cifar.yaml task.data=FOLDER`` runs one; ``python -m benchmarks.quality.keep`` takes
its result into ``benchmarks/results``.
"""
