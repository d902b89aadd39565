"""The aviary: an embedded, generated data set of birds (see the module docstrings)."""
