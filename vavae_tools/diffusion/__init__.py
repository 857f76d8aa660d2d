"""Noise → latents: the denoiser, its conditions, objectives, samplers, and the pipeline that holds them."""
