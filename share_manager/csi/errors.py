"""What a call is answered with instead of a result. The text goes into the events of a PVC or pod."""

from __future__ import annotations

from typing import ClassVar

import grpc

from share_manager.errors import ShareManagerError


class CsiError(ShareManagerError):
    """Root of the tree. `code` is what the specification has for it."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class InvalidArgumentError(CsiError):
    """The request can never succeed as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(CsiError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(CsiError):
    """It is there, and different from what is asked for."""

    code = grpc.StatusCode.ALREADY_EXISTS


class OutOfRangeError(CsiError):
    code = grpc.StatusCode.OUT_OF_RANGE


class FailedPreconditionError(CsiError):
    """Something else has to be done before."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class AbortedError(CsiError):
    """Another operation on the same thing is under way."""

    code = grpc.StatusCode.ABORTED


class UnavailableError(CsiError):
    """Worth trying again as it is."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineError(CsiError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class InternalError(CsiError):
    code = grpc.StatusCode.INTERNAL
