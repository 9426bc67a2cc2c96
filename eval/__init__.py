"""A model in, figures out: validation loss, benchmarks, samples. Installed as gpt2repro.eval."""

import gpt2repro  # noqa: F401 (explains Ctrl-C while the libraries are imported)
