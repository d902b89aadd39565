"""Programs made up for CPUs, where `auto` takes XLA's: right, wrong, slow, one that does not compile."""

import functools
import json
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from grain_jax.models import attention, towers
from grain_jax.train import layer_trials, set_up, sharding
from tests import tiny
from tests.paths import ROOT

pytestmark = pytest.mark.long


def _right(q, k, v, within):
    mask = None if within is None else within.mask()
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _slow(q, k, v, within):
    jax.debug.callback(lambda: time.sleep(0.1))
    return _right(q, k, v, within)


def _wrong(q, k, v, within):  # the gradients alone
    out = _right(q, k, v, within)
    return out + 0.1 * (k - jax.lax.stop_gradient(k))


def _nan(q, k, v, within):
    return _right(q, k, v, within) / jnp.zeros(())


def _not_compiled(q, k, v, within):
    raise NotImplementedError("no such shape\nin this compiler")


def _slow_softmax(logits, dtype):
    jax.debug.callback(lambda: time.sleep(0.1))
    return jax.nn.softmax(logits).astype(dtype)


def put(monkeypatch, program, slow_xla=False):
    """`auto` takes this attention in the place of cuDNN's, and a trial takes a few calls."""
    monkeypatch.setattr(attention, "choose", lambda name, *_: "cudnn" if name == "auto" else name)
    monkeypatch.setattr(attention, "with_cudnn", program)
    once = functools.partial(layer_trials.median_seconds, seconds=0)
    monkeypatch.setattr(layer_trials, "median_seconds", once)
    monkeypatch.setattr(layer_trials, "TOWERS", {"text": towers.text_tower})  # masks its scores
    if slow_xla:
        monkeypatch.setattr(attention, "softmax", _slow_softmax)


def chosen(workdir, **changes):
    """`model.attention` of a run in that workdir once its programs are chosen."""
    config = tiny.small(**changes)
    mesh = sharding.make_mesh(config.mesh)
    run = set_up.SetUp(config, "", mesh, *[None] * (len(set_up.SetUp._fields) - 3))
    return layer_trials.choose(run, workdir).config.model.attention


@pytest.mark.parametrize(
    "program, slow_xla, expected, line",
    [
        (_right, True, "auto", r"attention cudnn \(\d\S* ms, xla \d\S* ms\)"),
        (_slow, False, "xla", r"attention xla \(cudnn: slower, \d\S* ms, xla \d\S* ms\)"),
        (_wrong, True, "xla", r"attention xla \(cudnn: differs by [1-9]\S*e-0[12]\)"),
        (_nan, True, "xla", r"attention xla \(cudnn: differs by nan\)"),
        (_not_compiled, True, "xla", r"attention xla \(cudnn: no such shape\)"),
    ],
)
def test_a_program_is_taken_where_it_is_right_and_fast(
    program, slow_xla, expected, line, tmp_path, monkeypatch, capsys
):
    put(monkeypatch, program, slow_xla)
    assert chosen(tmp_path) == expected
    assert re.fullmatch(f"programs on cpu: {line}\n", capsys.readouterr().err)


@pytest.mark.parametrize("depths, expected", [((2, 1), "auto"), ((1, 2), "xla")])
def test_a_layer_counts_as_often_as_its_tower_has_it(depths, expected, monkeypatch):
    """Image layers are 4 ms faster with the program, text layers 6 ms slower."""
    seconds = {"image": {"xla": 0.010, "auto": 0.006}, "text": {"xla": 0.010, "auto": 0.016}}
    trials = lambda c, tower, n, names: [layer_trials.Trial(seconds[tower][x], 0.0) for x in names]
    monkeypatch.setattr(layer_trials, "compare", trials)
    config = tiny.small(model__image__depth=depths[0], model__text__depth=depths[1])
    assert layer_trials._decide(config, 1, "cudnn")[0] == expected


def test_a_choice_is_kept_for_what_it_was_measured_with(tmp_path, monkeypatch, capsys):
    put(monkeypatch, _not_compiled)
    assert chosen(tmp_path, model__attention="cudnn") == "cudnn"  # a fixed value
    assert not list(tmp_path.iterdir())
    assert chosen(tmp_path) == "xla"
    monkeypatch.setattr(layer_trials, "compare", None)
    assert chosen(tmp_path) == "xla"
    assert f" (as in {tmp_path / 'programs.json'})" in capsys.readouterr().err
    with pytest.raises(TypeError):
        chosen(tmp_path, batch_size=32)
    (tmp_path / "programs.json").write_text(json.dumps({"key": []}))
    with pytest.raises(TypeError):
        chosen(tmp_path)


def test_on_cpus_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_trials, "compare", None)
    assert chosen(tmp_path) == "auto" and not list(tmp_path.iterdir())


def test_the_first_process_chooses_for_all(tmp_path):
    code = f"""
import sys, pytest
from etils import epath
from grain_jax.runtime import distributed
from tests.train import test_layer_trials as t
address, count, me = (word.split("=")[1] for word in sys.argv[1:])
distributed.initialize(address, int(count), int(me), 60)
with pytest.MonkeyPatch.context() as patch:
    t.put(patch, t._right if me == "1" else t._wrong, slow_xla=True)
    print("took", t.chosen(epath.Path({str(tmp_path)!r})))
"""
    two = [sys.executable, "-m", "grain_jax.launch.local", "--processes=2"]
    two += ["--devices-per-process=1", "--", sys.executable, "-c", code]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert sorted(line for line in lines if " took " in line) == ["[0] took xla", "[1] took xla"]
    assert len([line for line in lines if "differs by" in line]) == 1
