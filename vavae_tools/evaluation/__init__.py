"""Are the pictures any good: what a classifier makes of them, how far they are from real ones, and copies."""
