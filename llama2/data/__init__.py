"""From documents to batches: read, clean, deduplicate, mix (§2.1), tokenize into shards, pack,
load."""
