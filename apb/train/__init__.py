"""Training of what apb ships beside a model: drafting heads."""
