"""Local loss terms of the package, a file each, and what several of them need."""
