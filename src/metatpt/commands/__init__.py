"""The commands that need no Trainer: one typed function a file."""
