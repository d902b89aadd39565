"""The local loss terms of the package, one a file (losses/local.py, docs/method.md)."""
