"""From settings to images: inputs, prompts, noise, references, the loop over batches, output, kept graphs."""
