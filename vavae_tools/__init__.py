"""Synthetic pictures of a chosen person, from a few thousand private ones and one or two 16 GB GPUs."""
