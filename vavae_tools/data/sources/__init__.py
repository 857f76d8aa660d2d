"""Where images and captions come from, other than folders of classes."""
