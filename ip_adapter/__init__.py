"""What makes an IP-Adapter, and what the scripts share.

Here belong the image attention and its place in a UNet, the image prompt, pictures in and out, configuration,
command lines, building and merging models, training. Networks both families share belong to `ldm`, what only
SDXL has to `gm`.
"""

__version__ = "0.1.0"
