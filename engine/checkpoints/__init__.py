"""Checkpoints that are complete or absent: written, verified, compared with the run that resumes them, loaded."""
