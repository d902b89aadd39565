"""Every command from another folder, by relative paths with spaces and other letters than English ones.

One tiny run is shared by all.
"""

import shutil

import pytest
from etils import epath

from grain_jax.checkpoint import files
from grain_jax.convert import __main__ as convert
from grain_jax.convert import export
from grain_jax.core import errors
from grain_jax.data import build
from grain_jax.data.annotate import __main__ as annotate
from grain_jax.data.aviary import __main__ as aviary
from grain_jax.data.inspect import __main__ as inspect
from grain_jax.demo import __main__ as demo
from grain_jax.evaluate import __main__ as evaluate
from grain_jax.evaluate.report import page as report
from grain_jax.train import run
from tests import record_sets, tiny

pytestmark = pytest.mark.long

PICTURES, DATA, RUN = "schöne Bilder", "Sätze, gebaut", "mein Lauf 1"
ANNOTATED = ["--annotations", f"{PICTURES}/A.jsonl", "--images", PICTURES]
CHECKPOINT, CLASSES = ["--checkpoint", RUN], ["--images", "Klassen ä"]
NO_PASSES = ["--source=annotations", "--passes=none"]
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory, one_device):
    """The working directory, with images, records and a run of two steps."""
    folder = tmp_path_factory.mktemp("anderer Ordner ß")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        record_sets.write_annotations(epath.Path(PICTURES), 16, size=(40, 30))
        for name in ("linke Hälfte", "right_half"):
            (folder / "Klassen ä" / name).mkdir(parents=True)
            shutil.copy(f"{PICTURES}/00003.png", folder / "Klassen ä" / name)
        flags = ["--output", DATA, "--name", "tiny_set", "--num-shards", "4"]
        assert build.main([*ANNOTATED, *flags]) == 0
        run.train(tiny.config(**KEYS), epath.Path(RUN))
        yield folder


KEYS = dict(input__source="records", input__data_dir=DATA, input__name="tiny_set")
KEYS |= dict(total_steps=2, checkpoint_every=1, **tiny.SHALLOW)  # as in test_data_identity.py


def test_the_run_is_where_it_was_asked_for():
    assert files.finished_steps(RUN)[-1] == 2
    assert files.read_items(f"{RUN}/checkpoints/2").data[0]["shard_lengths"] == [4, 4, 4, 4]
    assert (epath.Path(RUN) / "report.html").exists()


ROWS = [  # main; arguments; what it writes
    (inspect.main, [f"{DATA}/tiny_set/1.0.0", "--output", "Blatt ö"], "Blatt ö/inspect.html"),
    (report.main, [RUN, "--output", "Seite ö.html"], "Seite ö.html"),
    (evaluate.main, ["zeroshot", *CHECKPOINT, *CLASSES, "--output", "ö/z.json"], "ö/z.json"),
    (convert.main, ["to-torch", "--input", RUN, "--output", "torch ö/m.pt"], "torch ö/m.pt"),
    (annotate.main, [*ANNOTATED, *NO_PASSES, "--output", "Zeilen ö"], "Zeilen ö/A.jsonl"),
    pytest.param(export.main, [*CHECKPOINT, "--output", "E ö"], "E ö/params.npz", marks=slow),
    pytest.param(aviary.main, ["--output", "V ö", "--images", "8"], "V ö/A.jsonl", marks=slow),
]


@pytest.mark.parametrize("main,arguments,written", ROWS)
def test_a_command_reads_and_writes_there(main, arguments, written):
    assert main(arguments) == 0
    assert epath.Path(written).stat().length > 0


def test_the_demo_names_the_missing_path_that_was_given():
    pytest.importorskip("gradio")
    for flag in (["--checkpoint", "nicht da ö"], ["--checkpoint", RUN, "--examples", "fehlt ö"]):
        with pytest.raises(errors.UserError, match=" ö"):
            demo.main(flag)
