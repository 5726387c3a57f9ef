"""Property tests are repeatable: hypothesis tries the same examples in every run."""

from hypothesis import settings

settings.register_profile("shared", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("shared")
