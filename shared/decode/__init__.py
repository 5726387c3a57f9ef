"""A decode in progress: canvas, cursor, lanes, and the leaves every loop calls."""
