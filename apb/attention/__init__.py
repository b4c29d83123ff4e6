"""Attention over segments: keys and values with one visibility rule each, merged by log-sum-exp."""
