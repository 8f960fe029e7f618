# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Speed of the training steps, for the log, and a training that is told to end."""

import signal
import threading
import time
from typing import Any

from transformers import TrainerCallback

from lalm.errors import Terminated, on_sigterm


class ThroughputCallback(TrainerCallback):
    """Times the optimisation steps only, without evaluation and saving.

    `recent()` covers the steps since its last call, `overall()` all steps of this process's run.
    """

    def __init__(self):
        self._reset(0)

    def _reset(self, tokens: int) -> None:
        self.seconds, self.steps, self.first_tokens = 0.0, 0, tokens
        self._begun, self._mark = 0.0, (0.0, 0, tokens)

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset(state.num_input_tokens_seen)

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._begun
        self.steps += 1

    def recent(self, state) -> dict[str, float]:
        """Return ``tokens_per_second`` (if counted) and ``eta_minutes`` from the steps since the last call."""
        seconds, steps, tokens = self._mark
        elapsed, done = self.seconds - seconds, self.steps - steps
        if done == 0 or elapsed <= 0:
            return {}
        seen = state.num_input_tokens_seen - tokens
        rate = {"tokens_per_second": round(seen / elapsed, 1)} if seen else {}
        self._mark = (self.seconds, self.steps, state.num_input_tokens_seen)
        left = max(0, state.max_steps - state.global_step) * elapsed / done
        return {**rate, "eta_minutes": round(left / 60, 2)}

    def overall(self, state) -> float:
        """Return tokens/s over all steps of this process's run, 0 if there were none."""
        return (state.num_input_tokens_seen - self.first_tokens) / self.seconds if self.seconds else 0.0


class StopOnSignal(TrainerCallback):
    """After SIGTERM the step in progress is finished and saved, on all processes the same one; then `Terminated`.

    A second SIGTERM does not wait.
    """

    accelerator: Any

    def __init__(self):
        self.is_asked = self.is_stopped = False

    def _ask(self) -> None:
        if self.is_asked:
            raise Terminated
        self.is_asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_asked = self.is_stopped = False
        if threading.current_thread() is threading.main_thread():
            self._before = on_sigterm(self._ask)

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_asked:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            self.is_stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        if self.is_stopped:
            raise Terminated(f"checkpoint-{state.global_step} is saved, and the same command resumes from it")
