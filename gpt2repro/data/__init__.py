"""From documents to batches: sources, prepare (token shards), shards (read and verify), order, loader, inspect."""
