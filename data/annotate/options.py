"""The options of the passes, of their models and of the check of an image: plain values that can be pickled."""

from typing import NamedTuple

PASSES = ("caption", "describe", "ground", "negatives")  # in their order
ALL = ("caption", "describe", "ground")  # of --passes all
NEGATIVES = 10  # of a description, at most
SHARD_SIZE = 1000  # images, of sources without shards of their own
# Names of grain_jax.data.sources.SOURCES, which is slow to import.
SOURCES = tuple(
    "annotations coco fg_ovd finehard flickr30k_entities folder grit karpathy lvis refcoco tfds"
    " visual_genome webdataset".split()
)


class Limits(NamedTuple):
    """Pixels of an image's edges. The upper one also keeps decompression bombs from being decoded."""

    min_side: int = 16
    max_side: int = 10_000


class LocalChat(NamedTuple):
    """What a `local_chat.LocalChat` needs, so that a worker elsewhere can make it too."""

    model: str = "llava-hf/llava-v1.6-mistral-7b-hf"  # a folder, or a name on the Hub
    batch_size: int = 8  # images at a time; halved when memory runs out
    max_tokens: int = 256  # of an answer
    device: str = ""  # "" takes the accelerator if there is one


class EndpointChat(NamedTuple):
    """What an `endpoint_chat.EndpointChat` needs. The key is not part of it, so that it is not written to logs and summaries."""

    url: str  # up to the version, as in http://host:8000/v1
    model: str  # as the server calls it
    max_tokens: int = 256  # of an answer
    concurrency: int = 16  # requests at a time
    requests_per_second: float = 0.0  # at most, retries included; 0 = no limit
    seconds: float = 120.0  # of a request, from connecting to the last byte
    tries: int = 6  # of a request, the first included
    key_variable: str = "OPENAI_API_KEY"  # of the environment; holds the key, where one is needed


class Detector(NamedTuple):
    """What a `detector.Detector` needs, so that a worker elsewhere can make it too."""

    model: str = "google/owlv2-base-patch16-ensemble"  # a folder, or a name on the Hub
    threshold: float = 0.3  # of the score; the paper's
    merge_iou: float = 0.5  # of two boxes of a description that overlap more, the better one stays
    batch_size: int = 8  # images at a time; halved when memory runs out
    device: str = ""  # "" takes the accelerator if there is one
