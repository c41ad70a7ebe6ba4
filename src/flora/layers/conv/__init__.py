"""Convolutions, straight and transposed."""
