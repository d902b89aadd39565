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

from benchmarks import side_by_side
from grain_jax.losses import streaming
from grain_jax.losses.ring import Ring
from grain_jax.losses.streaming import Columns

ARMS = {"float32": 0, "float32, tiles of 100": 0, "six passes": 6, "three passes": 3, "one pass": 1}
MEASURES = (
    "eval/seen/alpha_1.0/top1",
    "eval/unseen/alpha_0.5/top1",
    "eval/retrieval/image_to_text/r1",
)


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
    one = lambda a, b: jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)  # noqa: E731
    pairs = [
        one(x, y)
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


def _problem(rng, rows: int, width: int, spread: float):
    """Rows and columns around one direction: cosines near 1 - spread^2."""
    centre = rng.normal(size=width)
    centre /= np.linalg.norm(centre)
    near = lambda: centre + spread * rng.normal(size=(rows, width)) / np.sqrt(width)  # noqa: E731
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)  # noqa: E731
    return unit(near()), unit(near())


def errors(rows: int = 256, width: int = 512, scale: float = 100.0) -> list[dict]:
    """Worst error of the losses of rows, and of the gradients relative to their largest value."""
    found = []
    for spread in (3.0, 1.0, 0.3):
        a, b = _problem(np.random.default_rng(0), rows, width, spread)
        x, y = a.astype(np.float64), b.astype(np.float64)
        logits = scale * x @ y.T
        own = np.diag(logits).copy()
        highest = logits.max(1, keepdims=True)
        shares = np.exp(logits - highest)
        exact = (highest[:, 0] + np.log(shares.sum(1)) - own).mean()
        shares /= shares.sum(1, keepdims=True)
        exact_gradient = scale * (shares @ y - y) / rows
        for name, passes in (("float32", 0), ("six", 6), ("three", 3), ("one", 1)):

            def loss(rows_, columns):
                ids = jnp.arange(len(rows_))
                cost = streaming.negatives(
                    "softmax",
                    100,
                    Ring(),
                    rows_,
                    ids,
                    Columns(columns, ids, ids >= 0),
                    jnp.float32(scale),
                    jnp.float32(0),
                ).cost
                own = scale * (rows_ * columns).sum(-1)
                return streaming.loss_of_rows("softmax", own, cost).mean()

            with in_passes(passes):
                value, gradient = jax.jit(jax.value_and_grad(loss))(a, b)
            found.append(
                dict(
                    spread=spread,
                    passes=name,
                    loss=float(exact),
                    value=abs(float(value) - exact),
                    gradient=np.abs(gradient - exact_gradient).max() / np.abs(exact_gradient).max(),
                )
            )
    return found


def _train_arm(name: str, steps: int, seed: int, workdir: str) -> None:
    from grain_jax.configs import demo

    from grain_jax import config as config_lib
    from grain_jax import train

    c = demo.get_config()
    c.total_steps, c.seed, c.pictures, c.log_every = steps, seed, 0, 10
    c.checkpoint_every = steps
    if "tiles" in name:
        c.loss.tile = 100
    train.keep_freed_memory()
    with in_passes(ARMS[name]):
        train.train(config_lib.from_dict(c), epath.Path(workdir))


def _losses(workdir: epath.Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def trained(args: argparse.Namespace) -> dict:
    """Trains each arm, and compares its losses with those of float32."""
    folder = epath.Path(args.folder)
    rows = {}
    for name in ["float32", *(arm for arm in args.arms if arm != "float32")]:
        workdir = folder / f"{name.replace(' ', '_').replace(',', '')}_{args.seed}"
        command = [sys.executable, "-m", "benchmarks.precision", "arm", "--arm", name]
        command += ["--steps", str(args.steps), "--seed", str(args.seed), "--folder", str(workdir)]
        if not (workdir / "results.json").exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows[name] = dict(losses=_losses(workdir))
        rows[name] |= json.loads((workdir / "results.json").read_text())
        base = rows["float32"]["losses"]
        differences = [abs(loss - base[step]) for step, loss in rows[name]["losses"].items()]
        rows[name]["largest_difference"] = max(differences)
        rows[name]["last_loss"] = np.mean(list(rows[name]["losses"].values())[-5:])
        print(
            f"{name:24} loss {rows[name]['last_loss']:.4f}, at most {max(differences):.4f} from float32; "
            + ", ".join(f"{key} {rows[name][key]:.3f}" for key in MEASURES if key in rows[name]),
            flush=True,
        )
    return rows


def main() -> int:
    """Prints the errors, or trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["errors", "train", "arm"], metavar="errors|train")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/precision", help="of the runs")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.command == "arm":
        _train_arm(args.arm, args.steps, args.seed, args.folder)
        return 0
    machine = side_by_side.machine("jax")
    print(side_by_side.on(machine))
    if args.command == "train":
        rows = trained(args)
    else:
        rows = errors()
        for row in rows:
            print(
                f"spread {row['spread']:<4} loss {row['loss']:9.5f}  {row['passes']:8} value {row['value']:.1e}"
                f"  gradient {row['gradient']:.1e}"
            )
    side_by_side.write(args.json, dict(machine=machine, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
