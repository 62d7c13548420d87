"""Training: optimizer, step, loop, resume state, log, validation, and what of a model is trained."""
