"""Is a folder of shards what it promises, what is in it, and what can be brought back."""
