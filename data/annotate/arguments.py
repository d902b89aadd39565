"""The flags of `grain-jax annotate`; further ones go to Beam."""

from grain_jax.cli.flags import flag, many, share
from grain_jax.cli.parser import Command
from grain_jax.data.annotate import PASSES
from grain_jax.data.arguments import label_text, option

ALL = ("caption", "describe", "ground")  # of --passes all


def _passes(text: str) -> tuple[str, ...]:
    names = set(text.split(",")) - {"none"}
    if not names <= {"all", *PASSES}:
        raise ValueError(f"got {text!r}, expected all, none, or some of {','.join(PASSES)}")
    names |= {*ALL} if "all" in names else set()
    return tuple(name for name in PASSES if name in names)


class Annotate(Command, name="annotate"):
    """Lets models write captions, descriptions and boxes for your images, on Apache Beam.

    The same command again goes on with an interrupted job. Flags that are not listed here, such as --runner,
    go to Beam.

    Example:
      grain-jax annotate --images images --output annotated --passes caption,describe \\
          --endpoint http://HOST:8000/v1 --chat MODEL
      grain-jax annotate --source coco --images train2017 --output coco --passes none \\
          --annotations instances.json captions.json

    images:
      --images DIR             folder of images, or of tar shards; not needed if the source has the images
      --output DIR             folder for all results; the same folder again to go on
      --source NAME|module:Class  annotations, coco, csv, fg_ovd, finehard, flickr30k_entities, folder, grit,
        hf-dataset, karpathy, lvis, parquet, refcoco, tfds, visual_genome, webdataset, or a class of your own
        (data/sources/base.py) (default: webdataset if DIR has .tar files, else folder)
      --option KEY=VALUE [KEY=VALUE ...]  options of the source, such as the names of columns
      --annotations FILE [FILE ...]  annotation files, for a source that has them
      --split NAME             split, for a source that has splits
      --label-text TEXT        text that makes a description of a label, {}: "a photo of a {}"
      --shard-size N           images per shard; a kill loses at most the shards in work. A tar is a shard
      --min-side PIXELS        leave out images with a shorter side
      --max-side PIXELS        leave out images with a longer side
      --max-faults SHARE       share of the images that may have a fault, 0 to 1; beyond it the status is 2
      --[no-]keep-images       write the images of tars and TFDS datasets to OUTPUT/images

    models:
      --passes PASS,PASS       some of caption,describe,ground,negatives; all (default) is
        caption,describe,ground; none only converts what the source has
      --negatives N            most hard negatives that the pass negatives makes per description
      --chat MODEL             folder or Hugging Face name of the chat model (default:
        llava-hf/llava-v1.6-mistral-7b-hf), or its name at the endpoint
      --endpoint URL           address of an OpenAI-compatible server, such as http://HOST:8000/v1
      --concurrency N          requests at a time, per worker
      --request-seconds S      seconds until a request ends as a time-out
      --tries N                tries per request, with the first one
      --detector MODEL         folder or Hugging Face name of the detector
      --threshold SCORE        leave out boxes with a lower score, 0 to 1
      --batch-size N           images per batch of a local model
    """

    images: str = ""
    output: str
    source: str | None = None
    option: list[tuple[str, str]] = many(parse=option)
    annotations: list[str] = many()
    split: str = ""
    label_text: str = flag("", parse=label_text)
    shard_size: int = 1000
    min_side: int = 16
    max_side: int = 10_000  # also keeps decompression bombs from being decoded
    max_faults: float = share(0.01)
    keep_images: bool = True
    passes: tuple[str, ...] = flag(ALL, parse=_passes)
    negatives: int = 10
    chat: str | None = None
    endpoint: str | None = None
    concurrency: int = 16
    request_seconds: float = flag(120.0, low=0.001, high=1_000_000)
    tries: int = 6
    detector: str = "google/owlv2-base-patch16-ensemble"
    threshold: float = share(0.3)  # the paper's
    batch_size: int = 8
    beam: list[str] = many()  # flags of none of the above

    def __post_init__(self):
        if self.endpoint and not self.chat:
            raise ValueError("--endpoint: got no --chat, expected the model's name at the endpoint")
