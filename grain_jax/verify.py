"""python -m grain_jax.verify WORKDIR [--from STEP] [--steps K]: is this run what its receipt says?

Checks that the records of the saves form one unbroken chain, and that checkpoints, metrics and config are
the recorded ones. Then trains K steps again, from a checkpoint (or from the seed: --from 0), on the run's
own data: batches must be equal on any number of devices, parameters bit for bit where mesh and versions
are the recorded ones, and losses within a tolerance elsewhere. Status 0: proved; 1: it is not; 2: it
cannot be checked.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors, train
from grain_jax.convert import initialise
from grain_jax.input_pipeline import device, sources
from grain_jax.runtime import (
    checkpoint,
    command_line,
    digests,
    metrics_file,
    metrics_writer,
    receipt,
)
from grain_jax.runtime.arguments import Parser
from grain_jax.training import sharding, train_step

# The largest difference of a loss term, as a share of the loss, that rounding on another mesh explains.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
# Steps for which that holds; later, training has made the difference larger (1e-3 after 124 steps of a tiny
# model on 1 and on 4 devices), and the losses are printed without a judgement.
HORIZON = 50
STEPS = 5  # where no checkpoint says how far
MOST_DEVICES = 512  # virtual ones; each has threads of its own, and a record may say any number


class Mismatch(Exception):  # noqa: N818
    """The run is not what it claims to be; the message has one line a cause."""


class Kept(NamedTuple):
    """A checkpoint of the run."""

    folder: epath.Path
    config: config_lib.Config
    record: dict[str, Any]
    data: list[dict[str, Any]] | None  # what it says of its record sets


class Run(NamedTuple):
    """All that a workdir says of its run."""

    records: list[dict[str, Any]]  # in the order of the steps
    kept: dict[int, Kept]  # by step
    metrics: dict[int, dict[str, Any]]  # lines of metrics.jsonl by step
    config: config_lib.Config  # of config.json


def say(what: str, found: str) -> None:
    """Prints a row of the table."""
    print(f"{what:<22}  {found}", flush=True)


def verify(workdir: epath.PathLike, *, start: int | None = None, steps: int | None = None) -> None:
    """Checks a workdir and prints what was found.

    Args:
      workdir: of a run that has saved at least once.
      start: the step of a kept checkpoint to train again from, or 0; None: the oldest kept one that
        something follows.
      steps: how many; None: up to the next kept checkpoint.

    Raises:
      Mismatch: the run is not what it claims to be.
      UserError: it cannot be checked: no records, no such checkpoint, no data, nothing to compare.
    """
    run = read(epath.Path(workdir))
    check_metrics(run)
    check_config(run)
    first = _first_step(run, start)
    last = _last_step(run, first, steps)
    place = Place()
    check_data(run)
    check_checkpoints(run, place)
    proved = replay(run, place, first, last)
    print(
        f"\nVerdict: {workdir} is the run that its receipt describes."
        f" {_steps(first + 1, last).capitalize()}: {proved}."
    )


def read(workdir: epath.Path) -> Run:
    """Reads what the workdir says, and checks that the records are one chain. Raises as `verify`."""
    if not workdir.is_dir():
        raise errors.UserError(f"{workdir}: no such folder; expected the --workdir of a run")
    records, faults = _chain(workdir)
    folder = workdir / "checkpoints"
    kept, newest = {}, None
    for step in checkpoint.finished_steps(workdir):
        kept[step] = _kept(folder / str(step))
    if not kept or not (records or faults):
        raise errors.UserError(
            f"{workdir}: no {'finished checkpoint' if records else receipt.FILE}; expected the workdir of a"
            " run that has saved"
        )
    by_step = {record["step"]: record for record in records}
    for step in sorted(kept):
        if step not in by_step:
            faults.append(f"checkpoint {step}: {receipt.FILE} has no record of it")
        elif kept[step].record != by_step[step]:
            keys = [k for k in by_step[step] if by_step[step][k] != kept[step].record.get(k)]
            faults.append(
                f"checkpoint {step}: the record in it is another one than in {receipt.FILE}"
                f" ({', '.join(keys)})"
            )
        elif by_step[step]["config"] != receipt.config_sha256(kept[step].config):
            faults.append(f"checkpoint {step}: its config is not the recorded one")
        elif by_step[step].get("data") not in (None, receipt.sha256(kept[step].data)):
            faults.append(f"checkpoint {step}: what it says of its data is not what was recorded")
        newest = step
    beyond = [record["step"] for record in records if record["step"] > newest]
    if len(beyond) > 1:  # one may be: of the save that was cut off
        faults.append(
            f"{receipt.FILE}: goes on to step {beyond[-1]}, but the newest checkpoint is {newest}"
        )
    if faults:
        raise Mismatch("\n".join(faults))
    say(
        "records", f"{len(records)}, one chain, steps {records[0]['step']} to {records[-1]['step']}"
    )
    if records[0]["previous"]:
        say("", f"those before step {records[0]['step']} are not in this workdir")
    if beyond:
        say("", f"that of step {beyond[0]} is of a save that was cut off")
    return Run(records, kept, _metrics(workdir), _config_json(workdir))


def _chain(workdir: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    records, faults = [], []
    for number, line in enumerate(receipt.read(workdir), 1):
        try:
            record = json.loads(line)
            missing = [key for key in receipt.KEYS if key not in record]
        except (json.JSONDecodeError, TypeError):
            missing = receipt.KEYS
        if missing:
            fault = (
                f"{receipt.FILE}:{number}: got {line[:60]!r}, expected a record with {missing[0]}"
            )
            return records, [*faults, fault]
        step, previous = record["step"], record["previous"]
        if records and previous != receipt.sha256(records[-1]):
            faults.append(
                f"{receipt.FILE}:{number}: the chain is broken: the record of step {step} does not follow"
                f" from the one of step {records[-1]['step']}"
            )
        if records and step <= records[-1]["step"]:
            faults.append(f"{receipt.FILE}:{number}: step {step} follows {records[-1]['step']}")
        records.append(record)
    return records, faults


def _kept(folder: epath.Path) -> Kept:
    try:
        config = checkpoint.read_json(folder, "config")
        record = checkpoint.read_json(folder, "receipt")
        data = checkpoint.read_data(folder)
    except (OSError, ValueError) as error:
        raise Mismatch(f"checkpoint {folder.name}: cannot be read ({error})") from None
    return Kept(folder, config_lib.from_dict(config), record, data)


def _config_json(workdir: epath.Path) -> config_lib.Config:
    try:
        return config_lib.from_dict(json.loads((workdir / "config.json").read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise Mismatch(f"config.json: cannot be read ({error})") from None


def _metrics(workdir: epath.Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl by step, each with its text; but for the one that a kill cut off.

    Raises Mismatch where it has others, or two of a step.
    """
    lines: dict[int, dict[str, Any]] = {}
    read, faults = metrics_file.read(metrics_file.files(workdir))
    if faults:
        raise Mismatch("\n".join(faults))
    for step, values, text in read:
        if lines.setdefault(step, values | {"text": text})["text"] != text:
            raise Mismatch(f"{metrics_file.FILE}: two lines of step {step}")
    return lines


def check_metrics(run: Run) -> None:
    """Raises Mismatch where lines of metrics.jsonl are not those that a record has the hash of."""
    texts = [values["text"] for values in run.metrics.values()]
    before, faults, checked = 0, [], 0
    for record in run.records:
        step = record["step"]
        lines = [s for s in run.metrics if before < s <= step]
        # A checkpoint that was copied to a new workdir came without the lines before it.
        copied = record is run.records[0] and record["previous"] and not lines
        if not copied and receipt.metrics_sha256(texts, before, step) != record["metrics"]:
            faults.append(
                f"metrics.jsonl: the lines of {_steps(before + 1, step)} are not those that were there at the"
                " save"
            )
        for key in ("batch_chain", "pixel_chain"):
            if step in run.metrics and run.metrics[step].get(key) != record[key]:
                faults.append(f"metrics.jsonl: {key} of step {step} is not the recorded one")
        before, checked = step, checked + len(lines)
    if faults:
        raise Mismatch("\n".join(faults))
    say("metrics.jsonl", f"{checked} lines, as recorded")


def check_config(run: Run) -> None:
    """Raises Mismatch where config.json has other numbers than the newest checkpoint was made with."""
    newest = max(run.kept)
    here, there = (
        config_lib.select(dataclasses.asdict(c), {"order", "numbers"})
        for c in (run.config, run.kept[newest].config)
    )
    faults = [
        f"config.json: {key}: got {here.get(key)!r}; checkpoint {newest} was made with {there.get(key)!r}"
        for key in sorted(here | there)
        if here.get(key) != there.get(key)
    ]
    if faults:
        raise Mismatch("\n".join(faults))
    say("config.json", f"as in checkpoint {newest}")


def _first_step(run: Run, start: int | None) -> int:
    kept = sorted(run.kept)
    if start is None:
        reached = max([*kept[1:], *run.metrics], default=0)
        return kept[0] if reached > kept[0] else 0
    if start and start not in run.kept:
        raise errors.UserError(
            f"--from: got {start}, expected 0 or one of the kept checkpoints, {', '.join(map(str, kept))}"
        )
    return start


def _last_step(run: Run, first: int, steps: int | None) -> int:
    after = sorted(step for step in run.kept if step > first)
    there = [*run.metrics, *(record["step"] for record in run.records)]
    newest = max(there)
    if steps is not None:
        last = first + steps
        if last > newest > first:
            raise errors.UserError(
                f"--steps: got {steps}, expected at most {newest - first}: nothing is recorded of the steps"
                f" after {newest}"
            )
    elif after and first:
        last = after[0]
    else:
        last = min(first + STEPS, newest) if newest > first else first + STEPS
    if not any(first < step <= last for step in there):
        raise errors.UserError(
            f"{_steps(first + 1, last)}: nothing is recorded of them; take --from 0, or another --steps"
        )
    return last


def check_data(run: Run) -> None:
    """Raises UserError where a record set is not the one that the run was trained on any more."""
    newest = max(run.kept)
    stored, config = run.kept[newest].data, run.kept[newest].config
    unknown: list[str] = []
    identities = sources.open_source(config).identities(config)
    checkpoint.check_same_data(newest, stored, identities, unknown.append)
    say("data", "; ".join(unknown) or f"as checkpoint {newest} was trained on")


def check_checkpoints(run: Run, place: "Place") -> None:
    """Raises Mismatch where a kept checkpoint holds another state than its record says."""
    for step, kept in sorted(run.kept.items()):
        program = place.program(kept.config, kept.record)
        state = _restore(kept, program)
        wrong = receipt.contradictions(kept.record, state)
        if wrong:
            raise Mismatch(
                f"checkpoint {step}: holds another state than was saved ({', '.join(wrong)})"
            )
        say(
            f"checkpoint {step}",
            f"the state that was saved (params {kept.record['state']['params']}) on {_where(kept.record)}",
        )


def _restore(kept: Kept, program: train_step.Program) -> train_step.TrainState:
    try:
        return checkpoint.restore(kept.folder, checkpoint.placed(program.state, program.shardings))
    except Exception as error:  # whatever a reader makes of bytes that nobody wrote
        first = " ".join(str(error).split())[:200]
        raise Mismatch(f"checkpoint {kept.folder.name}: cannot be read ({first})") from None


class Place:
    """Builds programs where the records say, as far as this machine can, and keeps the last one."""

    def __init__(self):
        self._key = self._program = self._source = None

    def program(self, config: config_lib.Config, record: Mapping[str, Any]) -> train_step.Program:
        """The run's program on `mesh`."""
        mesh = self.mesh(config, record)
        key = (receipt.config_sha256(config), str(mesh.shape))
        if key != self._key:
            self._source = sources.open_source(config)
            total, per_epoch = train.resolve_steps(config, self._source.num_examples(config))
            self._program = train_step.build(
                config, mesh, total_steps=total, steps_per_epoch=per_epoch
            )
            self._key = key
        return self._program

    def mesh(self, config: config_lib.Config, record: Mapping[str, Any]) -> jax.sharding.Mesh:
        """The recorded mesh, else one over all devices here, else one device."""
        devices = jax.devices()
        choices = [
            record["mesh"],
            dict(data=len(devices), fsdp=1, tensor=1),
            dict(data=1, fsdp=1, tensor=1),
        ]
        for sizes in choices:
            count = math.prod(sizes.values())
            if count > len(devices):
                continue
            options = dataclasses.replace(config.mesh, dcn_data=1, **sizes)
            mesh = sharding.make_mesh(options, devices[:count])
            try:
                sharding.check_batch(config, mesh)
            except sharding.ShardingError:
                continue
            return mesh
        raise AssertionError("one device always fits")

    def batches(
        self, config: config_lib.Config, program: train_step.Program, step: int
    ) -> device.Prefetch:
        """The run's batches from `step` on, for the last program."""
        lanes = sharding.lanes_of_process(
            program.batch_sharding,
            batch_size=config.batch_size,
            lanes=config.input.lanes,
            process_index=0,
        )
        return device.prefetch(
            self._source.batches(config, lanes=lanes, start_step=step), program.batch_sharding
        )


def _where(record: Mapping[str, Any]) -> str:
    mesh = " x ".join(str(size) for size in record["mesh"].values())
    count = record["processes"]
    return f"mesh {mesh}" + (f" of {count} processes" if count > 1 else "")


def replay(run: Run, place: Place, first: int, last: int) -> str:
    """Trains steps first + 1 .. last again and compares; returns what was proved, in words.

    Raises:
      Mismatch: other batches, or parameters or losses that rounding does not explain.
      UserError: the data or the config of that time is not there.
    """
    again = _Replay(run, place, first)
    for end in sorted({r["step"] for r in run.records if first < r["step"] < last} | {last}):
        again.to(end)
    return again.proved()


class _Replay:
    """The run, trained again from a step on, a stretch between two records at a time.

    Every restart goes on from a saved step, so that the config, mesh and versions of a record hold for all
    steps since the record before it.
    """

    def __init__(self, run: Run, place: Place, first: int):
        self.run, self.first, self.step = run, first, first
        self._records = {record["step"]: record for record in run.records}
        configs = [run.config, *(kept.config for kept in run.kept.values())]
        self._configs = {receipt.config_sha256(config): config for config in configs}
        self._place, self._state = place, None
        self._exact = True  # up to here, mesh and versions were as recorded
        self._equal_at: list[int] = []  # steps whose states are equal bit for bit
        self._rounded_at: list[int] = []  # whose are not, for which there is a reason
        self._reasons: list[str] = []
        self._errors: dict[int, float] = {}  # of the losses, by step

    def to(self, end: int) -> None:
        """Trains up to `end` and compares. Raises as `replay`."""
        record = next((r for r in self.run.records if r["step"] >= end), None)
        config = self._configs.get(record["config"]) if record else self.run.config
        if config is None:
            raise errors.UserError(
                f"{_steps(self.step + 1, end)}: the config of that time is in no kept checkpoint; take --from a later"
                f" checkpoint, or --steps {self.step - self.first} to stop before"
            )
        record = record or self.run.records[-1]
        program = self._place.program(config, record)
        if self._state is None:
            kept = self.run.kept.get(self.first)
            if kept:
                self._state = _restore(kept, program)
            else:
                told = lambda line: say("the towers", line)  # noqa: E731
                self._state = initialise.state_of_step_0(config, program, told)
        self._state = jax.device_put(self._state, program.shardings)
        here = receipt.environment(config)
        now = {"mesh": receipt.axes(self._place.mesh(config, record)), "processes": 1}
        self._reasons += [f"{k}: {now[k]}, then {record[k]}" for k in now if now[k] != record[k]]
        then = record["environment"]
        self._reasons += [
            f"{k}: {here[k]}, then {then.get(k)}" for k in here if here[k] != then.get(k)
        ]
        self._exact = self._exact and not self._reasons
        say(f"{_steps(self.step + 1, end)} again", f"on {_where(now)}")

        compiled = program.step.lower(program.state, program.batch).compile()
        batches, found = self._place.batches(config, program, self.step), {}
        try:
            for step in range(self.step + 1, end + 1):
                self._state, metrics = compiled(self._state, next(batches))
                self._same_batches(step)
                if step in self.run.metrics:
                    found[step] = _loss_error(metrics, self.run.metrics[step])
        finally:
            batches.close()
        self.step = end
        equal = end in self._records and self._same_state(self._records[end], here["platform"])
        limit = 0.0 if equal else TOLERANCE[config.dtype]
        for step, error in found.items():
            if self._judged(step) and not error <= limit:
                raise Mismatch(
                    f"step {step}: metrics.jsonl has other losses than this run: they differ by {error:.1e} of"
                    f" the loss, expected at most {limit:g}"
                )
        self._errors |= found

    def _same_batches(self, step: int) -> None:
        there = self._records.get(step) or self.run.metrics.get(step)
        if there is None:
            return
        chains = digests.chains(self._state.receipt)
        if chains["batch_chain"] != there.get("batch_chain"):
            raise Mismatch(
                f"step {step}: the run has seen other batches by then: another seed, other records or"
                " another order"
            )
        if chains["pixel_chain"] != there.get("pixel_chain"):
            what = f"step {step}: the run has seen other images by then"
            if self._exact:
                raise Mismatch(f"{what}, though versions and machine are the same")
            if not any("pictures" in reason for reason in self._reasons):
                self._reasons.append(f"{what}, or they are decoded in another way here")

    def _same_state(self, record: Mapping[str, Any], platform: str) -> bool:
        bits = digests.of_state(self._state)
        parts = [part for part in bits if bits[part] != record["state"].get(part)]
        if not parts:
            self._equal_at.append(record["step"])
            return True
        if self._exact and platform != "gpu":  # there, sums are in no fixed order
            raise Mismatch(
                f"step {record['step']}: training again gives other {' and '.join(parts)} than recorded,"
                " though mesh and versions are the same: a checkpoint, the config or the code was changed"
            )
        self._exact = False
        self._rounded_at.append(record["step"])
        return False

    def _judged(self, step: int) -> bool:
        """Whether the losses of `step` were judged: by equal bits after it, or as near enough to the start."""
        return step <= max(self._equal_at, default=0) or step - self.first <= HORIZON

    def proved(self) -> str:
        """The comparisons in words."""
        beyond = {s: e for s, e in self._errors.items() if not self._judged(s)}
        worst = max((e for s, e in self._errors.items() if s not in beyond), default=None)
        rows = [("  batches", "equal")]
        if self._equal_at:
            rows.append(("  states", f"equal bit for bit at step {_list(self._equal_at)}"))
        if self._rounded_at:
            rows.append(
                (
                    "  states",
                    f"not equal bit for bit at step {_list(self._rounded_at)}, as expected:",
                )
            )
            reasons = self._reasons or ["sums on a GPU are in no fixed order"]
            rows += [("", f"  {reason}") for reason in dict.fromkeys(reasons)]
        if worst is not None:
            how = "equal" if worst == 0 else f"differ by at most {worst:.1e} of the loss"
            rows.append(("  losses", f"{len(self._errors) - len(beyond)} lines, {how}"))
        if beyond:
            drift = max(beyond.values())
            what = f"up to {drift:.1e}, not judged: after {HORIZON} steps, rounding has grown"
            rows.append(("", f"  {_steps(min(beyond), max(beyond))}: {what}"))
        for row in rows:
            say(*row)
        if self._equal_at and not self._rounded_at:
            return "the same batches, and the same parameters bit for bit"
        if worst is not None:
            return f"the same batches, and the same losses to {worst:.1e} (rounding)"
        return "the same batches; no losses were logged that could be compared"


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _loss_error(metrics: Mapping[str, Any], line: Mapping[str, Any]) -> float:
    """The largest difference of a loss term, as a share of the logged loss."""
    scale = max(abs(line["loss"]), 1e-9)
    return max(abs(float(metrics[term]) - line[term]) for term in metrics_writer.LOSS_TERMS) / scale


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of steps")
    return int(text)


def _recorded_devices(workdir: epath.Path) -> int:
    """How many CPU devices the run had at most; 0 where it had others, too many to imitate, or bad records."""
    try:
        records = [json.loads(line) for line in receipt.read(workdir)]
        on_cpu = [r["mesh"] for r in records if r["environment"]["platform"] == "cpu"]
        count = max((int(math.prod(mesh.values())) for mesh in on_cpu), default=0)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError, OSError):
        return 0
    return count if 0 < count <= MOST_DEVICES else 0


def main(argv: list[str]) -> int:
    """Parses the command line and verifies; 0: proved, 1: not."""
    parser = Parser(prog="grain_jax.verify", description=__doc__)
    parser.add_argument("workdir", help="of a run")
    parser.add_argument(
        "--from", dest="start", type=_whole_number, metavar="STEP", help="a kept checkpoint, or 0"
    )
    parser.add_argument(
        "--steps", type=_whole_number, metavar="K", help="default: up to the next kept checkpoint"
    )
    args = parser.parse_args(argv[1:])
    if args.steps == 0:
        parser.error("--steps: got 0, expected at least 1")
    devices = _recorded_devices(epath.Path(args.workdir))
    if devices and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)  # virtual ones, as the run had
    try:
        verify(args.workdir, start=args.start, steps=args.steps)
    except Mismatch as mismatch:
        print(f"\nVerdict: {args.workdir} is NOT the run that its receipt describes:", flush=True)
        print(mismatch, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    command_line.main(main)
