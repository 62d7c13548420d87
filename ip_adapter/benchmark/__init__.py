"""What `tools/benchmark.py` measures: tasks, settings, the report. Nothing else imports it."""
