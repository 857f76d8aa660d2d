"""Images on disk → batches: the built-in data, the split, image folders, latents, and the order they come in."""
