"""Images as files and arrays: reading, preprocessing, masks, hints, saving, charts. Knows nothing of models."""
