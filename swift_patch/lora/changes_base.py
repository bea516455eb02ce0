"""Which ways to initialise a LoRA change the base layer's own weight. Imports no torch."""
from typing import Any

_CHANGE_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


def changes_base(init_lora_weights: Any) -> bool:
    """Returns whether a LoRA that is initialised so changes the base weights: they fit no other LoRA then."""
    return str(init_lora_weights).lower().startswith(_CHANGE_BASE)
