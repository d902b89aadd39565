"""The benchmark suite of the paper: zero-shot classification, retrieval, grounding, boxes, segmentation.

COMMAND   grain-jax evaluate suite --checkpoint DIR --config eval --output OUT.json
          --config.data_dir=DIR (TFDS), --config.folders=DIR (the rest), --config.descriptions=DIR (NAME.json)
          --config.evals.food101.split='test[:1000]' and the like for one set
          eval:probes adds linear probes of the TFDS sets, NAME_probe
DATA      nothing is downloaded: a missing set is skipped, and a line says how to get it
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from grain_jax.config.suite import entries, probes


def get_config(also=""):
    if also not in ("", "probes"):
        raise ValueError(f"got :{also}, expected :probes, or nothing")
    c = ConfigDict()
    c.data_dir = "~/tensorflow_datasets"
    c.folders = "~/grain_benchmarks"
    c.descriptions = placeholder(str)
    c.templates = placeholder(str)
    c.alphas = (1.0, 0.75, 0.5, 0.25, 0.0)
    # References: a value that the command line sets here is set in the entries too.
    shared = ("data_dir", "folders", "descriptions", "templates", "alphas")
    c.evals = entries(**{key: c.get_ref(key) for key in shared})
    if also == "probes":
        c.evals.update(probes(data_dir=c.get_ref("data_dir")))
    return c
