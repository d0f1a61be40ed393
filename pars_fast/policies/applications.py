"""Which application a request belongs to, by a field of the request.

Over HTTP: `"vllm_xargs": {"pars_app": "run-17", "pars_app_type": "map_reduce"}`; both are read from
`sampling_params.extra_args`. What a caller says is trusted: one that gives many ids gets many shares.
A trace has both in one column, as `map_reduce/17`, or an id alone.
"""

from typing import Any, NamedTuple


class Application(NamedTuple):
    """`id` tells applications apart, `type` chooses a demand; "" where the caller gave none."""

    id: str
    type: str

    @classmethod
    def parse(cls, name: str) -> "Application":
        """Of the name that a trace has for it; all of it is the id."""
        kind, slash, _ = name.partition("/")
        return cls(name, kind if slash else "")

    def xargs(self) -> dict[str, str]:
        """The fields by which a request says so."""
        return {"pars_app": self.id} | ({"pars_app_type": self.type} if self.type else {})


def application_of(request: Any) -> Application:
    """The application of a vLLM `Request`; one that names none, or no text or number, is its own."""
    params = getattr(request, "sampling_params", None)
    given: dict[str, Any] = (params.extra_args if params is not None else None) or {}
    app, kind = given.get("pars_app"), given.get("pars_app_type", "")
    if isinstance(app, bool) or not isinstance(app, str | int):
        app = f"request {request.request_id}"
    return Application(str(app), kind if isinstance(kind, str) else "")
