"""What only SDXL has: its conditioner, EDM denoising and samplers, its names on disk.

Networks are those of `ldm`; nothing here may be needed by SD-1.5.
"""
