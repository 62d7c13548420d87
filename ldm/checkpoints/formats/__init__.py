"""The byte layouts of checkpoint files, one module per format; nothing here knows of networks or holds a tensor.
Each has `index_...(file, size)`: where each tensor lies in an open file of that size, or `CheckpointError` if it
is cut short, damaged or holds what we cannot represent. Those we write have `write_...(write, infos, payload)`: it
hands the bytes of a file to `write` piece by piece, and calls `payload` once per name, in the order of `infos`, for
the flat uint8 bytes of that tensor.
"""
