"""Measuring decoders: quality against cost, on tasks that ship with the repository."""
