"""Which steps are logged, evaluated and saved."""

import dataclasses

import pytest

from grain_jax.core import errors
from grain_jax.train import schedule
from tests import tiny

pytestmark = pytest.mark.quick


def _due(steps=12, *, evals=True, preempted_at=0, minutes_are_over=lambda minutes: False, **keys):
    """(steps that are logged, evaluated, saved)."""
    defaults = dict(log_every=3, eval_every=4, checkpoint_every=5)
    plan = schedule.Schedule(tiny.config(**(defaults | keys)), steps, has_evals=evals)
    plan.minutes_are_over = minutes_are_over
    due_of = {step: plan.due(step, preempted=step == preempted_at) for step in range(1, steps + 1)}
    return tuple([s for s, due in due_of.items() if due[i]] for i in range(3))


def test_each_interval_counts_and_the_last_step_has_all():
    assert _due(13) == ([3, 4, 6, 8, 9, 12, 13], [4, 8, 12, 13], [5, 10, 13])
    assert _due(13, evals=False) == ([3, 6, 9, 12, 13], [], [5, 10, 13])
    assert _due(7, eval_every=0, checkpoint_every=0) == ([3, 6, 7], [7], [7])


def test_a_preempted_step_is_saved_and_not_evaluated():
    logged, evaluated, saved = _due(preempted_at=8)
    assert 8 in saved and 8 not in evaluated and 8 not in logged
    assert _due(preempted_at=12)[1:] == ([4, 8], [5, 10, 12])


def test_evaluations_are_saved_where_they_choose_the_best_checkpoint():
    config = tiny.config(eval_every=4, checkpoint_every=5)
    for metric, expected in (("loss", [5, 10, 12]), ("eval/birds/top1", [4, 5, 8, 10, 12])):
        config = dataclasses.replace(config, checkpoint_best_metric=metric)
        due = schedule.Schedule(config, 12, has_evals=True).due
        steps = (s for s in range(1, 13) if due(s, preempted=False).save)
        assert list(steps) == expected


def test_the_clock_is_asked_only_where_it_decides():
    asked = []

    def over(minutes):
        asked.append(minutes)
        return len(asked) == 2

    saved = _due(checkpoint_every_minutes=1.5, minutes_are_over=over)[2]
    assert asked == [1.5] * 5  # at the logged steps 3, 4, 6, 8, 9; 12 is the last
    assert saved == [4, 5, 10, 12]


def test_the_best_metric_is_one_that_is_measured():
    config = tiny.config(checkpoint_best_metric="los")
    message = "'los', which is not measured; did you mean 'loss'?"
    with pytest.raises(errors.UserError, match=message):
        schedule.check_best_metric(config, {"loss", "matched_iou"})
    assert schedule.best_metric(config, {"loss": 1.0}) is None
    assert schedule.best_metric(config, {"los": 1.0}) == {"los": 1.0}
    assert schedule.best_metric(tiny.config(), {"loss": 1.0}) is None
