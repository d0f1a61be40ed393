"""No guard: pure order of scores. A long request may wait for as long as shorter ones come."""

from dataclasses import dataclass
from typing import ClassVar

from pars_fast.guards.base import Guard


@dataclass(frozen=True, slots=True)
class NoGuard(Guard):
    name: ClassVar[str] = "none"
