"""A line about each command, which its own help and that of `grain-jax` begin with."""

ABOUT = {
    "train": "trains a model, or resumes from its newest checkpoint",
    "evaluate": "measures a checkpoint: classification, retrieval, grounding",
    "embed": "writes embeddings of images and their regions as Parquet files",
    "search": "finds images by texts, images or regions in embeddings of embed",
    "build": "makes TFRecords to train on, of images and annotations",
    "annotate": "writes captions, descriptions and boxes of images, by models, on Apache Beam",
    "inspect": "shows statistics, problems and a contact sheet of a data set",
    "convert": "converts checkpoints from and to PyTorch, Hugging Face, open_clip, big_vision",
    "export": "writes a model as StableHLO, which runs without grain_jax",
    "report": "writes a page about a run, or about several side by side",
    "demo": "serves an interactive page: drop an image, type classes, see regions",
    "verify": "checks that a run is what its receipt says",
    "plan": "tells memory, speed and price of a run on chips that are not here",
    "sweep": "trains every point of a sweep, and tabulates",
    "local": "starts a command as several processes on this machine",
    "launch-files": "copies the files that start runs on SLURM, GKE, TPU VMs and in containers",
    "aviary": "draws the embedded data set: birds of invented species, with annotations",
}
