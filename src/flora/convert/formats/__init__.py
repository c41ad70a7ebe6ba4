"""The file formats of adapters: one file each with detect, read and write."""
