"""Command lines: the flags of all scripts, and start and end of a process. The only place that knows argparse.

What the flags set in motion lives in the other packages; they name arguments, never flags.
"""
