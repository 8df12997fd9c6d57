"""A diffusers pipeline's own call, step by step: others may run between two of its steps, and it can be given up.

The call runs in a thread of its own, which goes on only while somebody waits in `advance`, so that never two run at a
time. It stops behind each `scheduler.step`, which every pipeline calls once a timestep. What a call changes in its
pipeline, scheduler and settings of the run, is its own; the networks are shared.
"""

import copy
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from elit.elastic.families.family import Pipeline
from elit.elastic.trees import Arguments, Tree


class StepwiseCall:
    """`pipe(**arguments)` inside `context`, begun by the first `advance`."""

    def __init__(self, pipe: Pipeline, arguments: Arguments, context: AbstractContextManager[None], *, users: int = 1):
        """users: how many may `leave` before the call is given up."""
        self.pipe, self.arguments, self.context, self.users = copy.copy(pipe), arguments, context, users
        self.pipe.scheduler = scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.step = self._pausing(scheduler.step)
        self.steps = 0
        """Taken so far."""
        self.output: Tree = None
        """The result of the call, once it is over."""
        self._error: Exception | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._over = self._given_up = False
        self._thread: threading.Thread | None = None

    @property
    def total(self) -> int:
        """Steps in all, as the scheduler has them; 0 before the first one."""
        return len(self.pipe.scheduler.timesteps) if self.steps else 0

    def advance(self) -> bool:
        """Runs to behind the next step, or to the end; returns whether it goes on. Raises what the call does."""
        if self._over or self._given_up:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
            self._thread.start()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return not self._over

    def finish(self) -> Tree:
        """Runs to the end; what the call returned."""
        while self.advance():
            pass
        return self.output

    def leave(self) -> None:
        """One user fewer; with the last one the call ends behind the step that it is in."""
        self.users -= 1
        if self.users <= 0:
            self._given_up = True
            self._go.release()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._given_up:
                with self.context:
                    self.output = self.pipe(**self.arguments)
        except _GivenUp:
            pass
        except Exception as error:  # raised by `advance`, for whoever waits there
            self._error = error
        finally:
            self._over = True
            self._paused.release()

    def _pausing(self, step: Callable[..., Tree]) -> Callable[..., Tree]:
        @functools.wraps(step)  # pipelines look at its arguments
        def paused(*args: Tree, **kwargs: Tree) -> Tree:
            result = step(*args, **kwargs)
            self.steps += 1
            self._paused.release()
            self._go.acquire()
            if self._given_up:
                raise _GivenUp
            return result

        return paused


class _GivenUp(Exception):
    """Nobody waits for the call any more."""
