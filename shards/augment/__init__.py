"""What an image becomes: draws in, pixels out, as DALI graphs and as their PIL reference."""
