"""What each experiment is made of."""
