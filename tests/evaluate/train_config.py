"""The tiny run with the evaluations of `suite_config`; its data's folder is the argument."""

from tests import tiny
from tests.evaluate import suite_config


def get_config(folder):
    c = tiny.dictionary(total_steps=2, eval_every=1, checkpoint_keep=1)
    c.evals = suite_config.get_config(folder).evals
    c.checkpoint_best_metric = "eval/classes/by_name/alpha_1.0/top1"
    return c
