"""The networks, one file per component, and CLIP's tokenizer; no files, samplers or devices."""
