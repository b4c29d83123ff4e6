"""Launchers: how the ranks come to be and how requests reach them."""
