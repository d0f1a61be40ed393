"""One line in the log now and then while requests are left waiting."""

import functools
import logging
import math
from collections.abc import Callable, Mapping

from pars_fast.integration.background import Background
from pars_fast.integration.metrics import CounterFile

logger = logging.getLogger("vllm.pars_fast")


class StatusLine:
    """Logs the counters every `every_s` seconds under load, from a background thread; 0 never does."""

    def __init__(
        self, counters: CounterFile, background: Background, every_s: float, clock: Callable[[], float]
    ) -> None:
        self._counters, self._background = counters.values, background
        self._every_s = every_s or math.inf
        self._clock = clock
        self._due_at = clock() + self._every_s

    def after_step(self) -> None:
        """A step left requests waiting."""
        now = self._clock()
        if now >= self._due_at:
            self._due_at = now + self._every_s
            self._background.submit(functools.partial(_log, dict(self._counters)))


def _log(values: Mapping[str, float]) -> None:
    order = "ranked" if values["pars_active"] else "in arrival order"
    tau = "not known yet"
    if not math.isnan(values["pars_kendall_tau"]):
        tau = (f"{values['pars_kendall_tau']:.2f} ({values['pars_kendall_tau_low']:.2f} to "
               f"{values['pars_kendall_tau_high']:.2f})")
    fallbacks = sum(value for name, value in values.items() if "_fallback_" in name)
    logger.info(
        "pars-fast: %d waiting, %s; %d of %d prompts scored, Kendall tau-b %s; %d overtakes, "
        "%d by the guard, %d fallbacks, step +%.0f us", values["pars_waiting"], order, values["pars_scored"],
        values["pars_submitted"], tau, values["pars_overtaken"], values["pars_guard_promotions"], fallbacks,
        values["pars_step_overhead_us_p50"],
    )
