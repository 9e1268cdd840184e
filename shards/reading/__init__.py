"""From shards to batches on the device, with what happens when a sample or a file fails."""
