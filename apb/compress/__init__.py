"""Compressors choose the essential KV pairs of a block; one file each."""
