"""Define every error that agentmem raises. Each message names the value, the limit and the remedy.

AgentmemError
├── SettingsRefused (ValueError)        a setting cannot work; nothing was done
│   ├── CapTooSmall                     the cap cannot hold prefix, recent window, minimum budget, temporary bytes
│   ├── UnknownPolicy                   no such policy; the message suggests similar names
│   └── UnsupportedModel                the model's attention, cache or wrapping is not handled
├── UnsupportedGeneration (ValueError)  a generation mode or argument that the memory cannot serve
│   └── PromptMismatch                  a second prompt that does not extend what the memory has seen
├── MemoryCapExceeded (MemoryError)     the next step would need more bytes than the cap
├── CompactionFailed                    a compaction could not finish; the memory is valid, and the next step retries it
├── PolicyContractBroken                a policy returned something that its contract forbids
├── MemoryUnused                        a capped block ended and no forward ever used the memory
├── CapBypassed                         a forward inside a capped block would have used a cache outside the cap
├── MemoryClosed                        a memory, session or runtime was used after it was closed
├── ModelUnavailable                    a model could not be fetched, verified or read
├── SnapshotRefused (ValueError)        a saved session is damaged, unsafe or of another model; nothing was loaded
├── RequestRefused                      a request that the server cannot serve; the error has the HTTP status
├── RuntimeBusy                         the runtime has no room for another session now; nothing was changed
├── CopyRefused (TypeError)             a memory, session or runtime cannot be copied or pickled
└── TurnEnded                           a turn was ended early (deadline, hook); the session is valid
"""

from __future__ import annotations

from agentmem.untrusted.texts import bounded


class AgentmemError(Exception):
    """Base class of every error that agentmem raises on purpose. The length of its message is bounded."""

    def __init__(self, message: str = "") -> None:
        """Store the message; if it is too long, cut out its middle."""
        super().__init__(bounded(message))


class SettingsRefused(AgentmemError, ValueError):
    """A setting cannot work; nothing was done."""


class CapTooSmall(SettingsRefused):
    """The cap is too small for the prefix, the recent window, the minimum budget and the temporary bytes."""


class UnknownPolicy(SettingsRefused):
    """No policy of that name is installed."""


class UnsupportedModel(SettingsRefused):
    """The model's attention, cache layout or wrapping is not handled."""


class UnsupportedGeneration(AgentmemError, ValueError):
    """A call uses a generation mode or argument that a capped memory does not support."""


class PromptMismatch(UnsupportedGeneration):
    """A prompt does not begin with the tokens that the memory has already seen."""


class MemoryCapExceeded(AgentmemError, MemoryError):
    """The next step would need more bytes than the cap allows."""


class CompactionFailed(AgentmemError):
    """A compaction could not finish; the memory is valid and readable, and the compaction may be tried again."""


class PolicyContractBroken(AgentmemError):
    """A policy returned something that its contract forbids; nothing was committed."""


class MemoryUnused(AgentmemError):
    """A capped block ended although no forward ever used its memory."""


class CapBypassed(AgentmemError):
    """A forward inside a capped block would have stored keys and values in a cache outside the cap."""


class MemoryClosed(AgentmemError):
    """A memory, session or runtime was used after it was closed or its capped block had ended."""


class ModelUnavailable(AgentmemError):
    """A model could not be fetched, verified, converted or read."""


class SnapshotRefused(AgentmemError, ValueError):
    """A saved session is damaged, unsafe or of another model; nothing was loaded from it."""


class RequestRefused(AgentmemError):
    """The server cannot serve a request; nothing was changed."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Store the HTTP answer's ``status``, OpenAI's ``code`` and ``param``, and ``retry_after`` in seconds."""
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


class RuntimeBusy(AgentmemError):
    """The runtime's cap is leased to other sessions, which did not free enough bytes in time; nothing was changed."""


class CopyRefused(AgentmemError, TypeError):
    """An object whose bytes count under a cap cannot be copied or pickled; nothing was changed."""

    @classmethod
    def of(cls, held: object) -> CopyRefused:
        """Return the error for the object ``held``, which somebody tried to copy."""
        return cls(
            f"a {type(held).__name__} cannot be copied or pickled: its bytes are counted under one cap. Go on in two "
            "ways with session.fork() of an agentmem.Runtime, or keep it in a file with session.save(...)"
        )


class TurnEnded(AgentmemError):
    """A turn was ended before its reply was complete; the session is valid and can go on."""
