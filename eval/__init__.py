"""What a checkpoint is worth: validation loss, samples, benchmarks, curves."""
