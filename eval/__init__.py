"""A model in, figures out: validation loss, benchmarks, samples. Installed as gpt2repro.eval."""
