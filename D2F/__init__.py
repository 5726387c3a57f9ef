"""D2F: several blocks in flight, on LLaDA and on Dream (see README.md)."""
