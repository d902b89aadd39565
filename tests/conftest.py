"""8 virtual CPU devices for every test, compiled quickly rather than well; set before JAX starts."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

from grain_jax.core import progress
from tests import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Commands that tests start need not compile the modules of the checkout each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        compiling.FLAGS,
    )
)
# What one test compiled, the next one and the commands that tests start need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grain_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# How long compiling takes is no matter of the code: tests that read stderr see no line about it.
progress.COMPILING_SECONDS = 1e6

# Tracing makes millions of objects that live for seconds, beside those of the modules, which live for ever.
gc.set_threshold(50_000, 10, 10)


def pytest_collection_finish():
    """What the modules hold is never garbage: it need not be looked through again."""
    gc.freeze()


# Files with the most seconds of tests, the longest first: what starts last, ends last.
LONG = (
    "tests/train/test_invariance.py",
    "tests/train/test_run.py",
    "tests/losses/test_streaming.py",
    "tests/convert/test_to_onnx.py",
    "tests/convert/test_exits.py",
    "tests/train/test_memory.py",
    "tests/train/test_keep.py",
    "tests/input_pipeline/test_mixture.py",
    "tests/launch/test_plan.py",
    "tests/train/test_initialise.py",
    "tests/convert/test_huggingface.py",
    "tests/models/test_attention.py",
    "tests/train/test_flops.py",
    "tests/train/test_lora_run.py",
    "tests/train/test_step_cost.py",
    "tests/runtime/test_processes.py",
    "tests/convert/test_open_clip.py",
    "tests/test_orientation.py",
    "tests/input_pipeline/test_records.py",
    "tests/test_parity.py",
    "tests/models/test_box_head.py",
    "tests/losses/test_losses.py",
    "tests/test_data_identity.py",
    "tests/test_paths.py",
    "tests/launch/test_sweep.py",
    "tests/examples/test_loss.py",
    "tests/data/test_tables.py",
    "tests/losses/test_matching.py",
    "tests/test_recipes.py",
)

# Files with runs of one program, which a process builds once (tests/tiny.py): one of the two processes has them all.
TOGETHER = (
    "tests/test_data_identity.py",
    "tests/test_paths.py",
    "tests/examples/test_data_source.py",
    "tests/hostile/test_stored_runs.py",
)

# `python -m pytest -m quick`: files and tests that together touch every package, chosen by their measured seconds.
# It leaves out what starts other processes, trains a whole run, or converts and annotates with models.
QUICK = (
    "tests/config/test_config.py",
    "tests/test_documents.py",
    "tests/test_howto.py",
    "tests/test_site.py",
    "tests/test_imports.py",
    "tests/test_parity.py",
    "tests/test_named.py",
    "tests/test_quick.py",
    "tests/test_recipes.py::test_the_own_recipe_takes",
    "tests/test_recipes.py::test_every_family_of_towers_resolves",
    "tests/cli/test_parser.py",
    "tests/convert/test_parity.py",
    "tests/data/test_aviary.py",
    "tests/data/test_staging.py",
    "tests/demo/test_demo.py::test_classes_of_a_file",
    "tests/demo/test_demo.py::test_scores_are_those_of_classify",
    "tests/evaluate/test_evaluators.py",
    "tests/evaluate/test_goldens.py",
    "tests/evaluate/test_rates.py",
    "tests/evaluate/test_retrieval.py",
    "tests/evaluate/test_zeroshot.py",
    "tests/core/test_annotations.py",
    "tests/hostile/test_images.py",
    "tests/inference/test_prompts.py",
    "tests/inference/test_scores.py",
    "tests/input_pipeline/test_assemble.py",
    "tests/input_pipeline/test_order.py",
    "tests/input_pipeline/test_packing.py",
    "tests/input_pipeline/test_synthetic.py",
    "tests/evaluate/test_big_vision_adapter.py::test_register",
    "tests/launch/test_cost.py",
    "tests/losses/test_boxes.py",
    "tests/losses/test_losses.py",
    "tests/losses/test_matching.py::test_permuting_regions",
    "tests/losses/test_matching.py::test_pairs_without_a_finite_cost",
    "tests/losses/test_matching.py::test_no_regions",
    "tests/models/test_layers.py",
    "tests/checkpoint/pretrained/test_names.py",
    "tests/evaluate/report/test_page.py::test_which_curves_share",
    "tests/evaluate/report/test_page.py::test_the_line_of_a_curve",
    "tests/runtime/test_metrics_file.py",
    "tests/train/test_metrics_writer.py",
    "tests/train/test_optim.py",
    "tests/train/test_schedule.py",
    "tests/train/test_sharding.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """That of `--dist loadfile`, for which `TOGETHER` is one file."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return TOGETHER[0] if file in TOGETHER else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONG)))
    for item in items:
        name = item.nodeid
        chosen = name.startswith(tuple(entry + ("" if "::" in entry else "::") for entry in QUICK))
        if chosen and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
