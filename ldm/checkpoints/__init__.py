"""Checkpoint files: formats, layouts of other programs, names, and loading into networks."""
