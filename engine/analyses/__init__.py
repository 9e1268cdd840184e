"""What a model has learned, looked at."""
