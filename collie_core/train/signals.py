"""SIGTERM and SIGINT ask a run to finish its step, save and end."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType


class StopSignals:
    """Within `with`, `received` is the first SIGTERM or SIGINT.

    A SIGINT interrupts at once where it is the second one, or where `graceful` is false: outside the training
    loop there is no step to finish.  say: print a line when the first one comes.
    """

    def __init__(self, graceful: bool = True, say: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.graceful = graceful
        self._say = say
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number)
        interrupts = number == signal.SIGINT and not (first and self.graceful)
        if first and self._say:
            how = "ends now" if interrupts else "ends after the step, when it is saved"
            with suppress(RuntimeError):  # it may come while the main thread is printing
                print(f"{signal.Signals(number).name}: the run {how}", file=sys.stderr, flush=True)
        if interrupts:
            raise KeyboardInterrupt
