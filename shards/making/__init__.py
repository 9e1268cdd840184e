"""From a listing of images to shards: plan, screen, write, in parallel, and killed at any moment."""
