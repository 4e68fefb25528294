"""What can come of a request to the API server."""

from __future__ import annotations

from share_manager.errors import EnvironmentProblem, RuntimeProblem


class AccessError(EnvironmentProblem):
    """It is not known where the API server is, or who we are."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"no way to a Kubernetes API server: {self.where}: {self.reason}"


class KubeError(RuntimeProblem):
    """The API server did not do what it was asked for. `what` is the request, as in "get volumes/vol1"."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class ApiAwayError(KubeError):
    """No answer, or none that says whether it was done: unreachable, too slow, overloaded, shutting down. Look again,
    later. `retry_after` is in seconds, 0 when the server said nothing of it."""

    def __init__(self, what: str, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(what, reason)
        self.retry_after = retry_after


class NonsenseError(KubeError):
    """An answer that is not the API's."""


class RefusedError(KubeError):
    """The API server will not do it. `status` is HTTP's."""

    def __init__(self, what: str, reason: str, status: int) -> None:
        super().__init__(what, reason)
        self.status = status


class NotFoundError(RefusedError):
    """There is no such object, or no such kind."""


class ConflictError(RefusedError):
    """It was changed since it was read, or is another one by now: read it and decide again."""


class ExistsError(RefusedError):
    """There is one of that name already."""


class ExpiredError(RefusedError):
    """A watch cannot go on from there: list anew."""


class ForbiddenError(RefusedError):
    """We are not allowed to, or not known at all."""

    def __str__(self) -> str:
        return f"{self.what}: {self.reason} (see the roles in deploy/)"


class InvalidObjectError(RefusedError):
    """The schema, or a check of the API server, refuses it."""
