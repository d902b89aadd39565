"""What a run measures of a sharded model, on the devices of one process or, as a script, of several."""

import json
import sys
import types

import jax

from grain_jax import config as config_lib
from grain_jax.evaluate import kinds, suite
from grain_jax.train import journal
from tests import perturbed, tiny
from tests.evaluate import suite_config


def numbers(folder, devices):
    """The numbers of `suite_config` for a random model whose parameters are cut over so many devices."""
    wanted = tiny.dictionary(**tiny.SHALLOW, mesh__data=1, mesh__fsdp=devices)
    wanted.evals = suite_config.get_config(folder).evals
    for entry in wanted.evals.values():
        entry.batch_size = 3
    config = config_lib.from_dict(wanted)
    places = tiny.program(config, devices).shardings.params
    put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: x[part])
    params = jax.tree.map(put, perturbed.params(config.model), places)
    state = types.SimpleNamespace(params=params, ema_params=None)
    return journal.evaluate_all(config, suite.present(kinds.from_entries(config.evals)), state)


if __name__ == "__main__":
    from grain_jax.runtime import distributed

    folder, *where = sys.argv[1:]
    address, count, me = (word.split("=")[1] for word in where)
    distributed.initialize(address, int(count), int(me), 60)
    print("measured", json.dumps(numbers(folder, jax.device_count())))
