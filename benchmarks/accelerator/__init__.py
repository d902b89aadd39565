"""What an accelerator does with the train step: `python -m benchmarks.accelerator`."""
