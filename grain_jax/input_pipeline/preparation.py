"""What a run does with its dataset before the first step: makes a missing one, derives the numbers of the config."""

import shlex
import subprocess
import sys
from collections.abc import Callable

import jax

from grain_jax.config import Config
from grain_jax.core import errors
from grain_jax.input_pipeline import derived, sources, text_lengths
from grain_jax.runtime import ending, processes


def open_or_make(config: Config) -> sources.DataSource:
    """The source of a run; if its data is missing, the first process runs `input.prepare` before it is opened.

    Only the trainer calls this, with the config that its user passed: a stored config may come from anyone.
    """
    if jax.process_index() == 0 and config.input.prepare:
        try:
            sources.open_source(config)
        except errors.MissingData:
            words = shlex.split(config.input.prepare)
            command = ["python", "-m", *(word.format(**vars(config.input)) for word in words)]
            print(f"No dataset yet: {shlex.join(command)}", file=sys.stderr, flush=True)
            with subprocess.Popen([sys.executable, *command[1:]]) as child:
                ending.at_end(child.terminate)
                status = child.wait()
            if status:
                said = f"input.prepare: {shlex.join(command)} ended with {status}"
                raise errors.UserError(said) from None
    processes.wait_for_all("dataset prepared")
    return sources.open_source(config)


def derive(
    config: Config,
    limits: derived.Limits,
    source: sources.DataSource,
    stored: Callable[[], tuple[Config | None, str]],
) -> tuple[Config, str]:
    """`derived.resolve` for the source, on the first process for all of them.

    Args:
      config: of the user.
      limits: of the devices and processes.
      source: the dataset, opened.
      stored: returns the config of the newest checkpoint and its name; called if a number is open.

    Raises:
      UserError: no number is possible. DataError: a record cannot be read.
    """
    if not derived.is_open(config):
        return config, ""

    def resolve():
        of_data = limits._replace(shards=source.num_shards(config))
        lengths = lambda: source.text_lengths(config)
        found, line = derived.resolve(config, of_data, lengths, *stored())
        return (found.input.lanes, found.text.pack_group, found.text.pack_rows), line

    numbers, line = processes.of_first(resolve)
    return derived.with_numbers(config, *numbers), line


def terms_without_data(config: Config) -> str:
    """A warning that names the keys of loss terms whose data no image of the datasets has; "" if there is none.

    It reads the sample of texts that grain-jax build keeps beside the records.
    """
    sets = config.input.sets if config.input.source == "records" else ()
    samples = [x for x in map(text_lengths.read, sets) if x]
    if not samples or len(samples) < len(sets):
        return ""
    boxes = any(x.descriptions.any() for x in samples)
    joined = config.input.descriptions_in_captions or config.input.captions_per_image == 3
    captions = any(x.captions.any() or x.synthetic.any() for x in samples) or (boxes and joined)
    terms = () if captions else ("image_caption",)
    if not boxes:
        terms += ("box", "region_description", "image_description", "box_description")
    if not (keys := [f"--config.loss.{name}=0" for name in terms if getattr(config.loss, name)]):
        return ""
    lacking = " or ".join(["captions"] * (not captions) + ["boxes"] * (not boxes))
    looked_at = " and ".join(f"{len(x.synthetic)} images of {x.name}" for x in samples)
    advice = f"terms that need them stay 0: set {' '.join(keys)}"
    return f"warning: no {lacking} in {looked_at}; {advice}"
