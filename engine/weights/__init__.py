"""Weights as files: what we export, what others released, and how a model begins with either."""
