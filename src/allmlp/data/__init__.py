"""Where training data comes from, and how it reaches a model."""
