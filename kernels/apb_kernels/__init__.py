"""Triton kernels for `apb`: attention over segments, decoding, merging, selection.

Each does what a plain-torch statement in `apb.attention` says; see README.md in this folder's
parent for the tile loops and why they are exact.
"""
