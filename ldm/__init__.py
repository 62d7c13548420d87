"""The networks Stable Diffusion 1.5 and SDXL share, checkpoint files, and SD-1.5 itself.

Here belong networks, their names on disk, schedules and samplers of the DDPM kind, the device. What only SDXL has
belongs to `gm`; image prompts, command lines and training belong to `ip_adapter`. Nothing here imports either.
"""
