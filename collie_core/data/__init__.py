"""Records to token batches: sources, masks, packing, order."""
