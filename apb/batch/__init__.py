"""Batch mode: many documents, one row of output each."""
