"""The networks Stable Diffusion 1.5 and SDXL share, checkpoint files, and SD-1.5 itself.

Here belong networks, their names on disk, schedules and samplers of the DDPM kind, the device. What only SDXL has
belongs to `gm`; image prompts, command lines and training belong to `ip_adapter`. Nothing here imports either.
"""

from ldm.parallel import prepare_process

prepare_process()
import ldm.device  # noqa: E402,F401  (after that, and before all else: it sets what MindSpore reads on import)
