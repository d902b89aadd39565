"""The flags of `grain-jax convert KIND` and `grain-jax export`."""

from grain_jax.cli.flags import flag, many, numbers
from grain_jax.cli.parser import Command
from grain_jax.config import DTYPES


class _OfCheckpoint(Command):
    """Kinds that read one of our models.

    what is converted:
      --checkpoint DIR  workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output PATH     file or folder to write; an older conversion is replaced
    """

    input: str = flag(name="checkpoint", also="input")
    output: str


class _OfFile(Command):
    """Kinds that read what others wrote.

    what is converted:
      --input PATH   file or folder (.pth.tar, .safetensors, FILE.npz:sub-tree), or hf://ORG/NAME
      --output PATH  folder to write; an older conversion is replaced
    """

    input: str = flag(also="checkpoint")
    output: str


class FromTorch(_OfFile, name="convert from-torch"):
    """The PyTorch reference's .pth.tar -> a folder for grain_jax.load.

    Example:
      grain-jax convert from-torch --input checkpoint.pth.tar --output model

    where the checkpoint does not state it:
      --image-heads N    attention heads of the image tower
      --text-heads N     attention heads of the text tower
      --decoder-heads N  attention heads of the decoder
    """

    image_heads: int | None = None
    text_heads: int | None = None
    decoder_heads: int | None = None


class ToTorch(_OfCheckpoint, name="convert to-torch"):
    """A checkpoint -> the PyTorch reference's .pth.tar.

    Example:
      grain-jax convert to-torch --checkpoint runs/demo --output demo.pth.tar
    """


class ToHf(_OfCheckpoint, name="convert to-hf"):
    """A checkpoint -> a folder for transformers: CLIPModel or SiglipModel for towers that fit, or AutoModel.

    Example:
      grain-jax convert to-hf --checkpoint runs/demo --output demo_hf

    what is written:
      --part all|towers  towers: a published model without the regions that were added to it
    """

    part: str = flag("all", choices=("all", "towers"))


class ToOpenClip(_OfCheckpoint, name="convert to-open-clip"):
    """A checkpoint of two towers -> a folder for open_clip's create_model_and_transforms("local-dir:DIR").

    Example:
      grain-jax convert to-open-clip --checkpoint runs/towers --output towers_open_clip
    """


class ToBigVision(_OfCheckpoint, name="convert to-big-vision"):
    """A checkpoint of two towers -> the .npz of big_vision's two_towers.

    Example:
      grain-jax convert to-big-vision --checkpoint runs/towers --output towers.npz
    """


class ToOnnx(_OfCheckpoint, name="convert to-onnx"):
    """A checkpoint -> a folder of ONNX files: image, text, boxes and similarity maps, as the model has them.

    Example:
      grain-jax convert to-onnx --checkpoint runs/demo --output demo_onnx
    """


class FromHf(_OfFile, name="convert from-hf"):
    """Weights of transformers (a folder, a file or hf://ORG/NAME) -> a folder for grain_jax.load.

    CLIP, MetaCLIP, SigLIP, SigLIP 2, TIPS v2, folders of to-hf, and DINOv3, which embeds images alone.

    Example:
      grain-jax convert from-hf --input hf://openai/clip-vit-base-patch32 --output towers
    """


class FromOpenClip(_OfFile, name="convert from-open-clip"):
    """CLIP, SigLIP or PE-core weights of open_clip -> a two-tower model for grain_jax.load.

    Example:
      grain-jax convert from-open-clip --input laion2b.safetensors --model ViT-B-32 --output towers

    where no open_clip_config.json lies beside the weights:
      --model NAME  of the model in open_clip, such as ViT-B-32
    """

    model: str | None = None


class FromBigVision(_OfFile, name="convert from-big-vision"):
    """A two_towers .npz of big_vision (FILE.npz:sub-tree) -> a two-tower model for grain_jax.load.

    Example:
      grain-jax convert from-big-vision --input lit.npz:params --output towers
    """


class Pack(_OfCheckpoint, name="convert pack"):
    """A checkpoint -> a small folder for grain_jax.load, in bfloat16.

    Example:
      grain-jax convert pack --checkpoint runs/demo --output packed
    """


class Average(Command, name="convert average"):
    """Equal models, or one -> the weighted sum of their parameters, a folder for grain_jax.load.

    Factors of LoRA are folded in first; one model alone is written with its factors folded in.

    Example:
      grain-jax convert average runs/finetuned start --weights 0.5,0.5 --output wise

    what is averaged:
      MODEL ...      workdirs, checkpoints or converted folders
      --weights W,W  a factor per model, with the sum 1; equal factors by default
      --output DIR   folder to write; an older conversion is replaced
    """

    model: list[str] = many()
    weights: tuple[float, ...] = flag((), parse=numbers)
    output: str


_KINDS = (
    *(FromTorch, ToTorch, ToHf, FromHf, FromOpenClip, ToOpenClip, FromBigVision, ToBigVision),
    *(ToOnnx, Pack, Average),
)


class Convert(Command, name="convert", kinds={kind.command: kind for kind in _KINDS}):
    """Converts checkpoints from and to PyTorch, Hugging Face, open_clip, big_vision.

    Every kind but average ends with a parity report. Exit status: 0; 1 if parity failed
    or the disk is full; 2 for wrong input.

    Example:
      grain-jax convert to-hf --checkpoint runs/demo --output demo_hf
    """


class Export(Command, name="export"):
    """Writes a model as StableHLO, which runs without grain_jax.

    Every function takes any number of images or texts and runs on CPUs, CUDA and TPUs.
    Exit status: 0; 1 where the functions give other outputs than the model; 2 for wrong input.

    Example:
      grain-jax export --checkpoint runs/demo --output exported

    what is exported:
      --checkpoint DIR  workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME
      --output DIR      folder to write
      --dtype TYPE      of the activations: float32 or bfloat16
    """

    checkpoint: str
    output: str
    dtype: str = flag("float32", choices=DTYPES)
