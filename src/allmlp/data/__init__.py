"""Where training data comes from, and how it reaches a model."""

NAMES = "names"
"""What a batch calls the names of its examples: for messages, a model does not take them."""
