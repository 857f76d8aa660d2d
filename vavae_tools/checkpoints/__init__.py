"""Checkpoints on the disk: read and written in every form, looked after, found again."""
