"""Checkpoint files of whole models: their parts, sizes, loading, merging, and dummy files for tests.

File formats and layouts of single networks belong to `ldm.checkpoints`.
"""
