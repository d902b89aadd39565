"""Training input: records or random batches -> `Batch`, texts packed, global arrays on the devices."""
