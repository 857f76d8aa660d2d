"""Pictures on disk → batches: the built-in data, the split, picture folders, latents, and the order they come in."""
