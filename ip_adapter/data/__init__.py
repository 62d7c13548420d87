"""Training data: lists of images and captions, buckets of sizes, tensors stored in tar files, features kept on disk.

Reading and resizing one image belongs to `images`.
"""
