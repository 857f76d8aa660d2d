"""The LightningModules, and what a session on a borrowed GPU needs: presets by machine, checkpoints, resuming."""
