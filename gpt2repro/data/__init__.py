"""Data, from documents to batches: sources, encoding, prepare, shards, order, loader, training_data."""
