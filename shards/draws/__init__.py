"""Everything random about data, as pure functions of (seed, epoch, sample)."""
