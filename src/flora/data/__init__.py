"""Data as users have it, on a disk or the hub: found, checked with file and line, split."""
