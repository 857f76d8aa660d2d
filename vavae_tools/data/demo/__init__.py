"""Made-up pictures and texts that everything can be tried on."""
