"""Texts as small images, a cell for each token."""
