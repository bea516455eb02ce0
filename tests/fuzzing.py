"""How many random cases are tried: in `make test` the same few each time, in `make fuzz STEPS=...` others, and more."""
import os
from hypothesis import HealthCheck, settings

# Of the random histories, in each wrapper. Whatever else is random grows with `make fuzz` in the same proportion.
GATE_STEPS = 2100


def tries(max_examples: int) -> settings:
    """The settings of a property that `make test` tries `max_examples` times."""
    steps = os.environ.get('FUZZ_STEPS')
    return settings(
        max_examples=max_examples if steps is None else max(max_examples * int(steps) // GATE_STEPS, 1),
        # The gate's verdict on a commit shall not be a matter of luck.
        derandomize=steps is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck))
