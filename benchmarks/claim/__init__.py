"""The experiment of docs/claim.md: `python -m benchmarks.claim`, and `python -m benchmarks.claim.regions`."""
