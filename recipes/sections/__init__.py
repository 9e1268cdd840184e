"""Parts of a recipe that are long enough for a file: the encoder, the images, the optimiser."""
