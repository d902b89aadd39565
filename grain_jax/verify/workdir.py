"""What a workdir says of its run, and whether its files agree: records, checkpoints, metrics, config."""

from typing import Any, NamedTuple

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import errors, regular_file
from grain_jax.input_pipeline import sources
from grain_jax.runtime import checkpoint, metrics_file, receipt


class Mismatch(Exception):
    """The run is not what its receipt says; the message has one line a cause."""


class Kept(NamedTuple):
    """A checkpoint of the run."""

    folder: epath.Path
    config: config_lib.Config
    record: dict[str, Any]
    data: list[dict[str, Any]]  # the identities of its record sets


class Told(NamedTuple):
    """All that a workdir says of its run."""

    records: list[dict[str, Any]]  # in the order of the steps
    kept: dict[int, Kept]  # by step
    metrics: dict[int, dict[str, Any]]  # lines of metrics.jsonl by step, each with its `text`
    config: config_lib.Config  # of config.json

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint."""
        return max(self.kept)


def say(what: str, found: str) -> None:
    """Prints a row of the table."""
    print(f"{what:<22}  {found}", flush=True)


def steps_in_words(first: int, last: int) -> str:
    """The words "step 3" or "steps 3-5"."""
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _raise(faults: list[str]) -> None:
    if faults:
        raise Mismatch("\n".join(faults))


def read(workdir: epath.Path) -> Told:
    """Reads what the workdir says, and checks that the records are one chain. Raises as `verify`."""
    if not workdir.is_dir():
        raise errors.UserError(f"{workdir}: no such folder; expected the --workdir of a run")
    records, faults = _chain(workdir)
    steps = checkpoint.finished_steps(workdir)
    kept = {step: _kept(workdir / "checkpoints" / str(step)) for step in steps}
    if not kept or not (records or faults):
        raise errors.UserError(
            f"{workdir}: no {'finished checkpoint' if records else receipt.FILE}; expected the workdir of a"
            " run that has saved"
        )
    by_step = {record["step"]: record for record in records}
    faults += [
        f"checkpoint {step}: {fault}"
        for step, one in kept.items()
        if (fault := _fault(one, by_step.get(step)))
    ]
    beyond = [step for step in by_step if step > steps[-1]]
    if len(beyond) > 1:  # one may be: of the save that was cut off
        newest = f"the newest checkpoint is {steps[-1]}"
        faults.append(f"{receipt.FILE}: goes on to step {beyond[-1]}, but {newest}")
    _raise(faults)
    first, last = records[0]["step"], records[-1]["step"]
    say("records", f"{len(records)}, one chain, steps {first} to {last}")
    if records[0]["previous"]:
        say("", f"those before step {first} are not in this workdir")
    if beyond:
        say("", f"that of step {beyond[0]} is of a save that was cut off")
    try:
        path, form = workdir / "config.json", dict[str, Any]
        config = config_lib.from_dict(regular_file.read_json(path, form, "the config of a run"))
    except regular_file.FileError as error:
        raise Mismatch(f"config.json: cannot be read ({error})") from None
    return Told(records, kept, _metrics(workdir), config)


def _fault(kept: Kept, record: dict[str, Any] | None) -> str:
    """What of a checkpoint is not as its record says, or ""."""
    if record is None:
        return f"{receipt.FILE} has no record of it"
    if kept.record != record:
        keys = [key for key in record if record[key] != kept.record.get(key)]
        return f"the record in it is another one than in {receipt.FILE} ({', '.join(keys)})"
    if record["config"] != receipt.config_sha256(kept.config):
        return "its config is not the recorded one"
    if record["data"] != receipt.sha256(kept.data):
        return "what it says of its data is not what was recorded"
    return ""


def _chain(workdir: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records up to the first that is none, and the faults of the chain."""
    records, faults = [], []
    for number, line in enumerate(receipt.read(workdir), 1):
        where = f"{receipt.FILE}:{number}"
        try:
            record = receipt.record_of(line, where)
        except errors.UserError as error:
            return records, [*faults, str(error)]
        before, step = records[-1] if records else None, record["step"]
        if before and record["previous"] != receipt.sha256(before):
            faults.append(
                f"{where}: the chain is broken: the record of step {step} does not follow"
                f" from the one of step {before['step']}"
            )
        if before and step <= before["step"]:
            faults.append(f"{where}: step {step} follows {before['step']}")
        records.append(record)
    return records, faults


def _kept(folder: epath.Path) -> Kept:
    try:
        config, record = (checkpoint.read_json(folder, item) for item in ("config", "receipt"))
        data = checkpoint.read_data(folder)
    except (OSError, ValueError) as error:
        raise Mismatch(f"checkpoint {folder.name}: cannot be read ({error})") from None
    return Kept(folder, config_lib.from_dict(config), record, data)


def _metrics(workdir: epath.Path) -> dict[int, dict[str, Any]]:
    """`Told.metrics`, without the line that a kill cut off. Raises Mismatch for other faults, or two lines of a step."""
    lines: dict[int, dict[str, Any]] = {}
    read, faults = metrics_file.read(metrics_file.files(workdir))
    _raise(faults)
    for step, values, text in read:
        if lines.setdefault(step, values | {"text": text})["text"] != text:
            raise Mismatch(f"{metrics_file.FILE}: two lines of step {step}")
    return lines


def check_metrics(run: Told) -> None:
    """Raises Mismatch where lines of metrics.jsonl are not those that a record has the hash of."""
    texts = [values["text"] for values in run.metrics.values()]
    before, faults, checked = 0, [], 0
    for record in run.records:
        step = record["step"]
        lines = [s for s in run.metrics if before < s <= step]
        # A checkpoint that was copied to a new workdir came without the lines before it.
        copied = record is run.records[0] and record["previous"] and not lines
        if not copied and receipt.metrics_sha256(texts, before, step) != record["metrics"]:
            lost = f"the lines of {steps_in_words(before + 1, step)} are not those that were there"
            faults.append(f"metrics.jsonl: {lost} at the save")
        for key in ("batch_chain", "pixel_chain"):
            if step in run.metrics and run.metrics[step].get(key) != record[key]:
                faults.append(f"metrics.jsonl: {key} of step {step} is not the recorded one")
        before, checked = step, checked + len(lines)
    _raise(faults)
    say("metrics.jsonl", f"{checked} lines, as recorded")


def check_config(run: Told) -> None:
    """Raises Mismatch where config.json has other numbers than the newest checkpoint was made with."""
    configs = run.config, run.kept[run.newest].config
    here, there = (config_lib.select(config, {"order", "numbers"}) for config in configs)
    _raise(
        [
            f"config.json: {key}: got {here.get(key)!r}; checkpoint {run.newest} was made with {there.get(key)!r}"
            for key in sorted(here | there)
            if here.get(key) != there.get(key)
        ]
    )
    say("config.json", f"as in checkpoint {run.newest}")


def check_data(run: Told) -> None:
    """Raises UserError where a record set is not the one that the run was trained on any more."""
    newest, unknown = run.kept[run.newest], []
    identities = sources.open_source(newest.config).identities(newest.config)
    checkpoint.check_same_data(run.newest, newest.data, identities, unknown.append)
    say("data", "; ".join(unknown) or f"as checkpoint {run.newest} was trained on")
