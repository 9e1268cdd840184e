"""WebDataset shards that somebody else made, used where they are."""
