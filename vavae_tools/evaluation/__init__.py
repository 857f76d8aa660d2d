"""Are the images any good: what a classifier makes of them, how far they are from real ones, and copies."""
