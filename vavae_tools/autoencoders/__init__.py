"""Images ↔ latents: the VA-VAE with a user-condition vector, and its losses."""
