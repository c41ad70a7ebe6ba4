"""Stacks of expert matrices."""
