"""The drawn world of the demo models: scenes, the judge that recognises them, training stages, evaluation.

Nothing outside imports it but its tools: deleting it breaks only those.
"""
