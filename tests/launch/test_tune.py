"""launch.tune: the fastest keys are kept, also after Ctrl-C, and the file of them trains."""

import json
import re

import pytest

from grain_jax.config import loading
from grain_jax.core import errors
from grain_jax.launch import chips, tune
from grain_jax.train import layer_trials, run
from tests import runs
from tests.paths import ROOT

pytestmark = pytest.mark.long

CONFIG = f"--config={ROOT}/tests/run_config.py"
FIXED = [f"--config.{key}={value}" for key, value in runs.SMALL.items()]


def test_the_file_of_a_tiny_config_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(tune, "INPUT_SECONDS", 0.1)
    monkeypatch.setattr(layer_trials, "compare", lambda *_: [layer_trials.Trial(1e-3, 0.0)])
    v5e = chips.CHIPS["v5e"]
    monkeypatch.setattr(tune, "chip_of", {"cpu": v5e}.get)
    fixed = [*FIXED, "--config.remat=none", "--config.model.text.unroll=1"]
    output = tmp_path / "tuned.txt"
    assert tune.main([CONFIG, *fixed, f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "  image xla                  1 ms\n" in printed
    said = re.findall(r"^  ([\w.]+=\d|as configured) +(.*)$", printed, re.M)
    assert [name for name, _ in said] == ["as configured", "microbatches=2"]
    assert "text.pack_group: got 2, expected a divisor" in said[1][1]  # one image a device
    assert re.search(r"plan: at best \S+ ms, bound by .* MFU", printed)
    assert re.search(r"input: \S+ images/s, the step needs \S+: ", printed)
    words = output.read_text().split()
    assert words[0] == "--config.microbatches=1"
    config = loading.load(CONFIG.partition("=")[2], [*fixed, *words, "--config.total_steps=2"])
    run.train(config, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.fixture
def steps(monkeypatch):
    """Steps of made-up seconds, or what they raise, one after the other."""
    results = []

    def step(self, keys):
        result = results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result, None

    monkeypatch.setattr(tune.Tuner, "step", step)
    monkeypatch.setattr(tune.Tuner, "layers", lambda self: ["auto", "xla"])
    return results


def test_each_key_is_chosen_beside_the_fastest_of_the_others(steps, tmp_path, capsys):
    output = tmp_path / "tuned.txt"
    # As configured; attention; remat dots, qkv and full; microbatches. One layer has one unroll.
    steps += [1.0, 0.8, RuntimeError("no\nmemory"), 0.795, 0.5, 0.4]
    assert tune.main([CONFIG, *FIXED, f"--output={output}"]) == 0
    assert output.read_text().splitlines() == [
        "--config.model.attention=xla",
        "--config.remat=full",
        "--config.microbatches=2",
    ]
    printed = capsys.readouterr().out
    assert "  remat=dots                               no\n" in printed
    assert "plan: no bound, since cpu is not among its chips" in printed and not steps


def test_ctrl_c_keeps_what_was_measured(steps, tmp_path):
    output = tmp_path / "new" / "tuned.txt"
    steps += [1.0, 0.8, KeyboardInterrupt()]
    assert tune.main([CONFIG, *FIXED, f"--output={output}"]) == 130
    assert output.read_text().splitlines()[:2] == ["--config.model.attention=xla", "--config.remat=none"]
    output.unlink()
    steps[:] = [KeyboardInterrupt()]
    with pytest.raises(errors.UserError, match="no step was measured, so nothing is written"):
        tune.main([CONFIG, *FIXED, f"--output={output}"])
    assert not output.exists()
