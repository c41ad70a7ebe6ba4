"""A mark in a merged model's config of what was merged into it, so that the same adapter is not applied twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

# The key of a list of fingerprints, in config.json and on the config of a live model of transformers.
MARK = "flora_merged"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short text that is the same for the same adapter, live or read from its folder.

    Args:
        tensors: every core and factor of the adapter, in any order.
    """
    digests = sorted(hashlib.sha256(_bytes(tensor)).digest() for tensor in tensors)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().to("cpu", torch.float32).contiguous()
    return str(tuple(plain.shape)).encode() + plain.flatten().view(torch.uint8).numpy().tobytes()
