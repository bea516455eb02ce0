"""What a server counts, for Prometheus."""
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing import Callable, Iterator

from ..compose.tickets import Ticket
from ..lora.library import AdapterLibrary

_SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server.

    Args:
        library: Its adapters.
        reads: Whether they are read in this process.
        max_batch_size: How many requests are answered together at most.
        waiting: Returns how many requests wait.
        running: Returns how many are being answered.

    Attributes:
        registry: What `/metrics` shows.
        requests: Requests by outcome: a status of HTTP, 499 where the client went away.
        batch_sizes: How many requests were answered together.
    """

    def __init__(self, library: AdapterLibrary, reads: bool, max_batch_size: int, waiting: Callable[[], float],
                 running: Callable[[], float]):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_OfLibrary(library, reads))
        self.requests = Counter('swift_patch_requests', 'Requests by outcome', ['outcome'], registry=self.registry)
        sizes = sorted({2**power for power in range(max_batch_size.bit_length())} | {max_batch_size})
        self.batch_sizes = Histogram(
            'swift_patch_batch_size', 'Requests that were answered together', buckets=sizes, registry=self.registry)
        self._seconds = {
            part: Histogram(f'swift_patch_{part}_seconds', help, buckets=_SECONDS, registry=self.registry)
            for part, help in {
                'queued': 'Seconds in which a request waited for its batch',
                'composing': "Seconds in which the adapters of a request's batch were composed",
                'generating': 'Seconds in which a request was answered'
            }.items()
        }
        self._tokens = Counter('swift_patch_tokens', 'Tokens by kind', ['kind'], registry=self.registry)
        for name, help, value in (('waiting', 'Requests that wait for a batch', waiting),
                                  ('running', 'Requests that are being answered', running)):
            Gauge(f'swift_patch_requests_{name}', help, registry=self.registry).set_function(value)

    def answered(self, ticket: Ticket, prompt_tokens: int, generated_tokens: int) -> None:
        """Counts a request that was answered."""
        self._seconds['queued'].observe(ticket.seconds_queued)
        self._seconds['composing'].observe(ticket.seconds_composing)
        self._seconds['generating'].observe(ticket.seconds_generating)
        self._tokens.labels('prompt').inc(prompt_tokens)
        self._tokens.labels('generated').inc(generated_tokens)


class _OfLibrary(Collector):
    """What a library has, and has read."""

    def __init__(self, library: AdapterLibrary, reads: bool):
        self._library, self._reads = library, reads

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily('swift_patch_adapters', 'Adapters that requests may name', len(self._library))
        if not self._reads:
            return
        reads = CounterMetricFamily(
            'swift_patch_adapter_reads', 'Adapters that were merged, by where from', labels=['source'])
        stats = self._library.stats
        reads.add_metric(['memory'], stats.hits)
        reads.add_metric(['disk'], stats.misses)
        yield reads
        cached = GaugeMetricFamily('swift_patch_cached_bytes', 'Memory that holds adapters', labels=['device'])
        for device, nbytes in stats.nbytes.items():
            cached.add_metric([str(device)], nbytes)
        yield cached
