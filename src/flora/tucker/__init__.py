"""The mathematics of a Tucker update: its form, ranks, folds, start and decomposition."""
