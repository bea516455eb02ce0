"""What becomes of one request in an engine: how long each part took, and whether anybody still waits for it."""
import time
import torch
from transformers import StoppingCriteria
from typing import Any, List, Optional, Sequence


class Ticket:
    """A request in an engine, from where it is queued to where it is answered. Its times are those of a clock.

    Attributes:
        is_abandoned: whether nobody waits for the answer any more. Set it at any time, from any thread.
        batch_size: how many requests were answered with it, itself included; 0 while it waits.
        seconds_composing: the seconds in which the adapters of its batch were composed.
        traceback: where the last error of its batch came from, as text, for an error's own holds tensors.
    """

    def __init__(self) -> None:
        self.is_abandoned = False
        self.batch_size = 0
        self.seconds_composing = 0.
        self.traceback = ''
        self._queued = time.perf_counter()
        self._started: Optional[float] = None
        self._composed: Optional[float] = None
        self._ended: Optional[float] = None

    @property
    def has_started(self) -> bool:
        """Whether it is in a batch."""
        return self._started is not None

    @property
    def is_composed(self) -> bool:
        """Whether what it asks for was composed."""
        return self._composed is not None

    @property
    def seconds_queued(self) -> float:
        """The seconds in which it waits, or waited, for a batch."""
        return (self._started or self._ended or time.perf_counter()) - self._queued

    @property
    def seconds_generating(self) -> float:
        """The seconds since it was composed, up to its end."""
        return 0. if self._composed is None else (self._ended or time.perf_counter()) - self._composed

    def start(self, batch_size: int) -> None:
        """Notes that it is in a batch of so many requests, from now on if not before."""
        self.batch_size = batch_size
        self._started = self._started or time.perf_counter()

    def composed(self, seconds: float) -> None:
        """Notes that it was composed just now, in so many seconds."""
        self.seconds_composing += seconds
        self._composed = time.perf_counter()

    def end(self) -> None:
        """Notes that it was answered, or will not be, if that is not noted yet."""
        self._ended = self._ended or time.perf_counter()


class UntilAbandoned(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Ends each row of a batch for which nobody waits any more, so that the others need not wait for it.

    Args:
        tickets: those of the requests, in the order of the rows; each may have several adjacent rows.
    """

    def __init__(self, tickets: Sequence[Optional[Ticket]]):
        self._tickets = tickets

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns for each row whether it ends, shape (rows,)."""
        ended: List[bool] = [ticket is not None and ticket.is_abandoned for ticket in self._tickets]
        # On a GPU, moving it costs more than there is to tell, mostly.
        if not any(ended):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        found = torch.tensor(ended, device=input_ids.device)
        return found.repeat_interleave(len(input_ids) // len(ended))
