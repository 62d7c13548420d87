"""CLIP-I and CLIP-T of images that an adapter makes, and the folder that results are kept in."""
