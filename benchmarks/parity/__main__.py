"""The parity table: compares our numbers with the PyTorch reference's, in groups.

    python -m benchmarks.parity [--json OUT.json]

Everything is float32 at full precision, on the goldens in tests/goldens, which are outputs of the reference
(tests/test_parity.py asserts the same comparisons). Each line shows the comparison of its group that is
closest to its tolerance.
"""

import sys

import jax

from benchmarks import harness
from benchmarks.parity import groups


def main() -> int:
    """Prints the table; the exit status is 1 if a comparison fails."""
    args = harness.arguments(__doc__)
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    columns = dict(group="18", compared=">8", failed=">6", worst_error=">11.2e", tolerance=">9.1e")
    table = harness.Table(columns | dict(worst="<1"))
    everything, failures = {}, 0
    for group in groups.GROUPS:
        comparisons = groups.compare(group)
        everything[group] = [c._asdict() | {"ok": c.ok} for c in comparisons]
        failed = sum(not c.ok for c in comparisons)
        failures += failed
        if not comparisons:
            print(f"{group:18} {0:8d}  not compared: TensorFlow is not installed")
            continue
        nearness = lambda c: (not c.ok, c.error / c.tolerance if c.tolerance else c.error)
        worst = max(comparisons, key=nearness)
        row = dict(group=group, compared=len(comparisons), failed=failed, worst_error=worst.error)
        table.add(**row, tolerance=worst.tolerance, worst=worst.name)
    harness.write(args.json, everything)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
