"""Texts as small pictures, a cell for each token."""
