"""What the passes of a TPU's float32 products do to the losses: errors against float64, and a trained model.

    python -m benchmarks.precision errors
    python -m benchmarks.precision train [--arms "three passes"] [--steps 1400] [--seed 0] [--folder runs/precision]

A TPU multiplies float32 as sums of bfloat16 products: six of them for `loss.precision=highest`, three for "high", one
where neither is asked for. A CPU multiplies float32, so that the passes are spelt out here: float32 products of the
bfloat16 parts of both sides. `errors` takes embeddings near each other and a large scale, the worst case of a
softmax. `train` trains the demo with each number of passes, in float32, and as a control in float32 with
smaller tiles, which changes nothing but the order of sums. An arm whose results lie in the folder is not trained again.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import harness
from grain_jax.losses import streaming
from grain_jax.losses.ring import Ring
from grain_jax.losses.streaming import Columns

ARMS = {"float32": 0, "float32, tiles of 100": 0, "six passes": 6, "three passes": 3, "one pass": 1}
MEASURES = (
    "eval/seen/alpha_1.0/top1",
    "eval/unseen/alpha_0.5/top1",
    "eval/retrieval/image_to_text/r1",
)
ROWS, WIDTH, SCALE = 256, 512, 100.0  # of `errors`


def _parts(x, count: int):
    """Bfloat16 parts of float32 values, as float32, the largest first; their sum is the value."""
    found = []
    for _ in range(count):
        found.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - found[-1]
    return found


def product(equation, a, b, passes: int):
    """The product as a TPU makes it in so many passes: pairs of parts whose orders sum to less than 1, 2 or 3."""
    order = {1: 1, 3: 2, 6: 3}[passes]
    pairs = [
        jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
        for i, x in enumerate(_parts(a, order))
        for j, y in enumerate(_parts(b, order))
        if i + j < order
    ]
    return sum(pairs[::-1])  # small ones first


@contextlib.contextmanager
def in_passes(passes: int) -> Iterator[None]:
    """The products of the streamed losses in so many passes; 0: float32."""
    plain = streaming._product
    if passes:
        streaming._product = lambda equation, a, b, _: product(equation, a, b, passes)
    try:
        yield
    finally:
        streaming._product = plain


def _loss(rows, columns):
    """The mean streamed loss of rows against columns, each with the column of its number as its own."""
    ids = jnp.arange(len(rows))
    given = (Columns(columns, ids, ids >= 0), jnp.float32(SCALE), jnp.float32(0))
    cost = streaming.negatives("softmax", 100, Ring(), rows, ids, *given).cost
    return streaming.loss_of_rows("softmax", SCALE * (rows * columns).sum(-1), cost).mean()


def errors() -> list[dict]:
    """Worst error of the losses of rows, and of the gradients relative to their largest value."""
    found = []
    for spread in (3.0, 1.0, 0.3):  # cosines near 1 - spread^2
        rng = np.random.default_rng(0)
        centre = rng.normal(size=WIDTH)
        centre /= np.linalg.norm(centre)
        near = [centre + spread * rng.normal(size=(ROWS, WIDTH)) / np.sqrt(WIDTH) for _ in "ab"]
        a, b = ((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32) for x in near)
        x, y = a.astype(np.float64), b.astype(np.float64)
        logits = SCALE * x @ y.T
        highest = logits.max(1, keepdims=True)
        shares = np.exp(logits - highest)
        exact = (highest[:, 0] + np.log(shares.sum(1)) - np.diag(logits)).mean()
        shares /= shares.sum(1, keepdims=True)
        exact_gradient = SCALE * (shares @ y - y) / ROWS
        for name, passes in (("float32", 0), ("six", 6), ("three", 3), ("one", 1)):
            with in_passes(passes):
                fresh = lambda a, b: _loss(a, b)  # which jit has not compiled in other passes
                value, gradient = jax.jit(jax.value_and_grad(fresh))(a, b)
            worst = np.abs(gradient - exact_gradient).max() / np.abs(exact_gradient).max()
            row = dict(spread=spread, passes=name, loss=float(exact))
            found.append(row | dict(value=abs(float(value) - exact), gradient=worst))
            print(
                f"spread {spread:<4} loss {exact:9.5f}  {name:8} value {found[-1]['value']:.1e}"
                f"  gradient {worst:.1e}"
            )
    return found


def train_arm(args: argparse.Namespace) -> None:
    """Trains the demo as the arm `args.arm` in this process."""
    from grain_jax.configs import demo

    from grain_jax import config as config_lib
    from grain_jax import train

    c = demo.get_config()
    c.total_steps = c.checkpoint_every = args.steps
    c.seed, c.pictures, c.log_every = args.seed, 0, 10
    if "tiles" in args.arm:
        c.loss.tile = 100
    train.keep_freed_memory()
    with in_passes(ARMS[args.arm]):
        train.train(config_lib.from_dict(c), epath.Path(args.folder))


def trained(args: argparse.Namespace) -> dict:
    """Trains each arm, and compares its losses with those of float32."""
    rows = {}
    for name in ["float32", *(arm for arm in args.arms if arm != "float32")]:
        workdir = epath.Path(args.folder) / f"{name.replace(' ', '_').replace(',', '')}_{args.seed}"
        command = [sys.executable, "-m", "benchmarks.precision", "arm", f"--arm={name}"]
        command += [f"--steps={args.steps}", f"--seed={args.seed}", f"--folder={workdir}"]
        if not (workdir / "results.json").exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        rows[name] = row = dict(losses=losses)
        row |= json.loads((workdir / "results.json").read_text())
        base = rows["float32"]["losses"]
        row["largest_difference"] = max(abs(loss - base[step]) for step, loss in losses.items())
        row["last_loss"] = np.mean(list(losses.values())[-5:])
        print(
            f"{name:24} loss {row['last_loss']:.4f}, at most {row['largest_difference']:.4f} from float32; "
            + ", ".join(f"{key} {row[key]:.3f}" for key in MEASURES if key in row),
            flush=True,
        )
    return rows


def main() -> None:
    """Prints the errors, or trains."""
    args = harness.arguments(
        __doc__,
        command=(str, dict(choices=["errors", "train", "arm"], metavar="errors|train")),
        steps=1400,
        arms=(list(ARMS), dict(choices=ARMS)),
        seed=0,
        folder=("runs/precision", dict(help="of the runs")),
        arm=(str, dict(choices=ARMS, help=argparse.SUPPRESS)),
    )
    if args.command == "arm":
        return train_arm(args)
    machine = harness.machine("jax")
    rows = trained(args) if args.command == "train" else errors()
    harness.write(args.json, dict(machine=machine, rows=rows))


if __name__ == "__main__":
    main()
