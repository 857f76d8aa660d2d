"""From conditions to samples: diffusers pipelines, and files of what they make."""
