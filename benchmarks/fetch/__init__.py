"""Real pictures out of Debian packages: `python -m benchmarks.fetch fashion|gcompris --output DIR`."""
