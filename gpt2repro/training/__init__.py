"""A run: its recipe, optimizer, schedule, checkpoints, metrics and guards."""
