"""An experiment in a part of its time, to see what it does before it is run in full."""

from __future__ import annotations

from dataclasses import replace

from deployments.experiment import Case, Experiment
from engine.errors import ConfigError


def shortened(experiment: Experiment, share: float) -> Experiment:
    """Cases whose duration, warm-up and changes come after that share of their times. Raises ConfigError.

    Workloads and arrivals stay as they are: a shorter run sees fewer turns of each session, so its figures are others.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--time-share must be above 0 and at most 1, got {share:g}", param="time_share")
    note = f"Run for {share:g} of the times that the file says (--time-share): a look at it, not its result."
    cases = [_shortened(case, share) for case in experiment.cases]
    return replace(experiment, cases=cases, notes=(*experiment.notes, note))


def _shortened(case: Case, share: float) -> Case:
    changes = tuple(replace(change, time_s=change.time_s * share) for change in case.changes)
    return replace(case, duration_s=case.duration_s * share, warm_up_s=case.warm_up_s * share, changes=changes)
