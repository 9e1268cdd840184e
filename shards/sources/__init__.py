"""Where images come from: class folders, official tars, parquet, lists. Each kind gives a `Listing`."""
