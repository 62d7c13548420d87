"""Noise schedules and samplers, as plain functions on arrays and tensors."""
