"""Fused kernels for `apb`; each sits beside the plain-torch statement it must equal."""
