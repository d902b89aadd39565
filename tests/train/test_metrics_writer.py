"""What a run tells: metrics.jsonl, TensorBoard, traces, Weights & Biases, progress, its time; lost texts."""

import json
import math
import re
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import losses
from grain_jax.core import metrics_file
from grain_jax.train import faults, goodput, metrics_writer, profiling, rates
from tests import tiny

pytestmark = pytest.mark.quick

TERMS = {"loss_image_caption": "caption", "loss_box": "box", "loss_uniform": "uniform"}
CHECKED = (*TERMS, "loss", "grad_norm")
METRICS = {term: 1.0 for term in CHECKED} | {"matched_iou": 0.5, "texts_dropped_share": 0}


def _write(workdir, start, losses, config=None):
    """A run that goes on from `start` and logs these losses, by step."""
    log = metrics_writer.MetricsWriter(workdir, start, config)
    for step, loss in losses.items():
        log.write(step, {"loss": float(loss)})
    log.close()


def _counted(texts, dropped, too_long=0):
    return dict(zip(faults.TextCounts.NAMES, (texts, dropped, too_long)))


def test_texts_are_counted_from_line_to_line():
    counts = faults.TextCounts(_counted(100, 4, 1), max_share=0.1)
    assert counts.add(_counted(1100, 24, 1)) == {
        "texts": 1100,
        "texts_dropped": 24,
        "texts_too_long": 1,
        "texts_dropped_share": 0.02,
        "texts_too_long_share": 0,
    }
    assert counts.check(7, lambda: "more rows") == (
        "step 7: 2.0% of the texts since the line before were dropped or cut, because they do not fit into"
        " their rows: more rows"
    )
    counts.add(_counted(2100, 33, 1))  # 0.9%
    assert counts.check(8, lambda: "more rows") is None
    counts.add(_counted(2148, 39, 1))  # 6 of 48 may be chance, for 10%
    assert counts.check(9, lambda: "more rows")
    counts.add(_counted(3148, 239, 1))
    said = r"^step 10: 20.0% .* more rows, or --config.text.max_dropped_share"
    with pytest.raises(faults.TextsLost, match=said):
        counts.check(10, lambda: "more rows")


@pytest.mark.parametrize("term", ["loss_uniform", "grad_norm"])
def test_the_first_bad_term_is_named(term):
    said = f"^{term} is nan at step 9; it was finite at step 5"
    with pytest.raises(faults.NotFinite, match=said):
        faults.check_finite({**METRICS, term: math.nan}, 5, 9, TERMS)
    faults.check_finite(METRICS, 5, 9, TERMS)


@pytest.fixture
def now(monkeypatch):
    """What the clocks say: now[0] seconds, and as many after 1000 in the time of day."""
    now = [0.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(goodput.time, "time", lambda: 1000 + now[0])
    return now


def test_rates_leave_pauses_out_and_have_mfu_where_the_peak_is_known(now, capsys):
    log = rates.Rates(0, 100, 10, flops_per_image=3e9, peak_flops=4e11)
    now[0] = 1.0
    with log.pause():
        now[0] = 50.0
    now[0] = 51.0
    found = log.since_last(10, wait_seconds=0.5)  # 10 images in each of 10 steps
    assert found["images_per_second"] == 50 and found["mfu"] == 0.375
    assert found["input_wait_fraction"] == 0.25
    log.show(10, METRICS | found)
    assert "  50 images/s  MFU 37.5%  input wait" in capsys.readouterr().err
    now[0] = 53.0
    assert log.since_last(14, wait_seconds=0.5)["input_wait_fraction"] == 0  # what came before does not count


def test_what_the_line_shows_adds_up_to_its_loss(now, capsys):
    now[0] = 1.0
    config = tiny.config(loss__image_caption=0.0, loss__box=0.25, loss__image_description=-2.0)
    terms = losses.terms_of(config.loss)
    values = {term.metric: 1.2346 + number for number, (term, _) in enumerate(terms)}
    total = sum(weight * values[term.metric] for term, weight in terms)
    shown = {term.metric: (term.short, weight) for term, weight in terms}
    log = rates.Rates(0, 9, 4, terms=shown)
    log.show(9, METRICS | values | {"loss": total} | log.since_last(9, 0))
    line = capsys.readouterr().err
    loss, summed, apart = re.search(r"loss (\S+) = (.*?)  \((.*?)\)  IoU", line).groups()
    assert summed == "box 0.25 x 2.235 + region 3.235 + description -2 x 4.235"
    assert apart == "weight 0: caption 1.235"
    products = [re.findall(r"-?\d\S*", part) for part in summed.split(" + ")]
    assert sum(math.prod(map(float, x)) for x in products) == pytest.approx(float(loss), abs=3e-3)


def _steps(file):
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_an_object_store_has_the_lines_at_each_checkpoint_and_at_the_end(tmp_path, monkeypatch):
    store = tmp_path / "store"  # a folder that is treated as one
    (store / "tensorboard").mkdir(parents=True)
    monkeypatch.setattr(metrics_writer, "is_object_store", lambda path: True)
    first = metrics_writer.MetricsWriter(store, 0)
    for step in range(1, 8):
        first.write(step, {"loss": 1.0})
        if step <= 6:
            first.flush()
    first._events.close()  # killed here: the line of step 7 never gets there
    whole = store / "metrics.jsonl"
    assert _steps(whole) == list(range(1, 7))
    second = metrics_writer.MetricsWriter(store, 5)
    assert _steps(whole) == list(range(1, 6))
    second.write(6, {"loss": 2.0})
    second.close()
    assert _steps(whole) == list(range(1, 7))
    scalars, purges = _scalars(store / "tensorboard")
    assert purges == [1, 6] and [step for step, _ in scalars] == [*range(1, 7), 6]


def _scalars(folder):
    """[(step, {name: value})] and the steps from which files purge, of TensorBoard's files in order."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, purges = [], []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                purges.append(event.step)
            if event.summary.value:
                values = {v.tag: v.simple_value for v in event.summary.value}
                scalars.append((event.step, values))
    return scalars, purges


def test_a_restart_forgets_the_steps_beyond_it_and_tensorboard_has_each_at_once(tmp_path):
    first = metrics_writer.MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step), "eval/birds/top1": 0.5})
    folder, file = tmp_path / "tensorboard", tmp_path / "metrics.jsonl"
    expected = [(s, {"loss": float(s), "eval/birds/top1": 0.5}) for s in range(1, 6)]
    assert _scalars(folder) == (expected, [1])  # before it is closed: a kill loses nothing
    first.close()
    with file.open("a") as lines:
        lines.write('{"step": 6, "lo')  # killed in the middle of a line
    _write(tmp_path, 3, {4: 40})
    assert _scalars(folder) == ([*expected, (4, {"loss": 40.0})], [1, 4])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]


class _Run:
    """Stands in for Weights & Biases' run: what its server would keep."""

    def __init__(self, step):
        self.step, self.logged, self.finished = step, [], False

    def log(self, metrics, step):
        self.step = step
        self.logged.append((step, metrics["loss"]))

    def finish(self):
        self.finished = True


def test_wandb_gets_a_restart_under_the_same_id_and_no_step_twice(tmp_path, monkeypatch):
    started = []

    def init(**options):
        started.append((_Run(6 * len(started)), options))  # the first run logged up to step 5
        return started[-1][0]

    fake = types.SimpleNamespace(init=init, Settings=dict, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny.config(wandb__mode="online", wandb__project="birds")
    for start, steps in ((0, range(1, 6)), (3, range(4, 9))):
        _write(tmp_path, start, {step: step for step in steps}, config=config)
    (first, options), (second, again) = started
    assert first.logged == [(s, float(s)) for s in range(1, 6)]
    assert second.logged == [(s, float(s)) for s in range(6, 9)]
    assert first.finished and second.finished
    assert options["id"] == again["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert options["project"] == "birds" and options["name"] == tmp_path.name
    assert options["resume"] == "allow" and options["config"]["batch_size"] == 16


def _line_of(step, clock):
    values = {"step": step, **clock.numbers()}
    return metrics_file.Line(step, values, json.dumps(values))


def _seconds(clock):
    numbers = clock.numbers()
    total = numbers[goodput.SECONDS]
    return {k: round(numbers[f"time/{k}"] * total, 6) for k in goodput.KINDS if numbers[f"time/{k}"]}


def test_two_kills_are_counted_by_hand(now):
    clock = goodput.Clock()
    now[0] = 2.0  # other
    with clock.spend("compile"):
        now[0] = 12.0
    lines = []
    with clock.spend("steps"):
        for step in (1, 2, 3):
            with clock.spend("input"):
                now[0] += 1.0
            now[0] += 9.0
            lines.append(_line_of(step, clock))
    assert _seconds(clock) == dict(other=2, compile=10, steps=27, input=3)
    now[0] = 50.0  # killed at 42, after step 3; the checkpoint has step 1
    clock = goodput.Clock()
    clock.resume_from(lines, 1)
    assert _seconds(clock) == dict(other=2, compile=10, steps=9, input=1, repeated=20, stopped=8)
    with clock.spend("steps"):
        now[0] += 10.0
        again = _line_of(2, clock)
    assert clock.numbers()[goodput.REPEATED] == 2
    lines = [lines[0], again]
    now[0] = 61.0
    clock = goodput.Clock()  # killed again; nothing was saved
    clock.resume_from(lines, 0)
    expected = dict(other=2, compile=10, repeated=40, stopped=9)
    assert _seconds(clock) == expected and clock.numbers()[goodput.REPEATED] == 4
    assert sum(clock.numbers()[f"time/{kind}"] for kind in goodput.KINDS) == pytest.approx(1)
    assert clock.words() == "steps lost by a restart 65.6%, compiling 16.4%, stopped 14.8%, other 3.3%"


def test_a_clock_that_goes_on_without_lines_is_new(now):
    clock = goodput.Clock()
    clock.resume_from([metrics_file.Line(3, {"step": 3, "loss": 1.0}, "")], 3)
    now[0] = 5.0
    assert _seconds(clock) == dict(other=5)


def test_the_slowest_process_is_named(monkeypatch):
    rows = np.array([[0.1, np.nan, np.nan], [1.6, 5e9, 6e9]])
    monkeypatch.setattr(goodput.jax, "process_count", lambda: 2)
    monkeypatch.setattr(goodput.multihost_utils, "process_allgather", lambda own: rows)
    numbers = goodput.of_processes(goodput.Own(0.1, np.nan, np.nan))
    assert numbers == {
        "memory_bytes": 5e9,
        "memory_peak_bytes": 6e9,
        "process/slowest": 1,
        "process/slowest_step_seconds": 1.6,
        "process/fastest_step_seconds": 0.1,
    }
    said = goodput.warning(numbers)
    assert said == (
        "process 1 is slow: 1.60 s per step beside the wait for devices, the fastest process 0.10 s"
    )
    assert goodput.warning(numbers | {"process/slowest_step_seconds": 0.5}) is None
    assert goodput.warning({}) is None


def _trace(workdir, ran, start, steps):
    trace = profiling.StepTrace(workdir, start, steps)
    for step in ran:
        trace.begin(step)
        outputs = jnp.arange(8) * step
        trace.end(step, outputs)
    trace.close()


def _traced(file):
    """The steps that the trace marks, as XProf finds them."""
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found.append(dict(event.stats)["step_num"])
    return sorted(found)


@pytest.mark.parametrize(
    "ran,traced",
    [
        (range(1, 8), [3, 4]),
        (range(4, 6), [4]),  # resumed inside the range: the rest of it
    ],
)
def test_the_chosen_steps_are_in_the_trace(tmp_path, ran, traced):
    _trace(tmp_path, ran, 3, 2)
    folders = list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*"))
    (folder,) = folders
    assert folder.name == f"step_{traced[0]}"
    assert _traced(folder / "process_00000.xplane.pb") == traced
    assert (folder / "process_00000.trace.json.gz").exists()


def test_nothing_is_traced_unless_asked_for(tmp_path):
    _trace(tmp_path, range(4), 0, 3)
    assert not list(tmp_path.iterdir())
