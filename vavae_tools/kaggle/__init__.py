"""Runs that go on in the next Kaggle session."""
