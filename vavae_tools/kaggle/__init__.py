"""Kaggle: what is asked of its clients, and what goes from session to session."""
