"""vLLM general plug-in: `PARS_ENABLE=1` gives any vLLM process a ranked waiting queue.

Loaded by every vLLM process (API server, EngineCore before it chooses its scheduler class, workers), so it
imports no torch, makes no CUDA context, and does nothing while PARS_ENABLE is unset. It wraps
`SchedulerConfig.get_scheduler_cls`, which EngineCore calls once. Source: vllm/plugins/__init__.py,
vllm/v1/engine/core.py (0.29 to 0.32).
"""

import functools
import logging
import os
import tempfile

TESTED_VLLM = ("0.29", "0.30", "0.31", "0.32")
_MARK = "_pars_fast_ranks"  # of a wrapper of ours: another plug-in's has `__wrapped__`, too

logger = logging.getLogger("vllm.pars_fast")  # below vLLM's own logger, so that its handler shows it


def register() -> None:
    """Entry point of `vllm.general_plugins`; safe to call more than once.

    Raises: SettingsError: if a `PARS_*` variable has a value that is not allowed; this stops the start.
    """
    if not os.environ.get("PARS_ENABLE"):
        return
    from pars_fast.settings import Settings

    settings = Settings.from_environ()
    if not settings.enable or not _version_is_supported(settings.force):
        return
    if _wrap_get_scheduler_cls():
        _show_metrics()


def _version_is_supported(force: bool) -> bool:
    import vllm

    minor = ".".join(vllm.__version__.split(".")[:2])
    if minor in TESTED_VLLM or force:
        return True
    logger.warning("pars-fast is tested with vLLM %s, not %s: the queue stays in arrival order. "
                   "PARS_FORCE=1 ranks all the same.", ", ".join(TESTED_VLLM), vllm.__version__)
    return False


def _show_metrics() -> None:
    from pars_fast.integration.metrics import register_collector, remove_at_exit

    if "PARS_METRICS_DIR" not in os.environ:  # the first process that loads us; its children inherit this
        os.environ["PARS_METRICS_DIR"] = tempfile.mkdtemp(prefix="pars-fast-")
        remove_at_exit(os.environ["PARS_METRICS_DIR"])
    register_collector(os.environ["PARS_METRICS_DIR"])


def _wrap_get_scheduler_cls() -> bool:
    """False if it is wrapped already."""
    from vllm.config.scheduler import SchedulerConfig

    original = SchedulerConfig.get_scheduler_cls
    if hasattr(original, _MARK):
        return False

    @functools.wraps(original)
    def get_scheduler_cls(self):  # type: ignore[no-untyped-def]
        from pars_fast.integration.scheduler import with_ranking

        return with_ranking(original(self))

    setattr(get_scheduler_cls, _MARK, True)
    SchedulerConfig.get_scheduler_cls = get_scheduler_cls
    return True
