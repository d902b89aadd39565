"""A suite of one set of each kind that needs no TensorFlow; its folder is an argument."""

from ml_collections import ConfigDict

from grain_jax.evaluate.kinds import evaluator


def get_config(folder):
    c = ConfigDict()
    c.data_dir = c.folders = c.descriptions = c.templates = ""
    c.alphas = (1.0, 0.5)
    annotated = dict(annotations=f"{folder}/A.jsonl")
    c.evals = dict(
        classes=evaluator("zeroshot", f"{folder}/classes", descriptions=f"{folder}/D.json"),
        probe=evaluator("linear_probe", f"{folder}/classes"),
        retrieval=evaluator("retrieval", f"{folder}/classes", **annotated),
        grounding=evaluator("grounding", f"{folder}/classes", **annotated),
        absent=evaluator("zeroshot", f"{folder}/absent", missing="skip", get="ask"),
    )
    return c
