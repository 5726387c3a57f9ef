"""The decoder networks and what they stand on: attention, masks, rotary, the cache, checkpoints, exact scores."""
