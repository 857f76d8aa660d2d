"""Made-up images and texts that everything can be tried on."""
