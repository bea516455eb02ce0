"""The part `activation`: the methods that it adds to ms-swift, in ms-swift's manner.

`edits.py` puts their text into the classes of the same names, and makes the methods that are there call them.
"""
import threading
from contextlib import contextmanager
from swift.tuners.utils import ActivationMixin, ModulesToSaveWrapper
from swift.utils import gc_collect


class SwiftModel:

    def _get_inactive_loras(self):
        """Returns the LoRA adapters that are active in no layer, in this thread."""
        from swift.tuners.lora import LoRAConfig
        inactive = {name for name, output in self.adapters.items() if isinstance(output.config, LoRAConfig)}
        for module in self.base_model.modules():
            if isinstance(module, ActivationMixin):
                inactive.difference_update(module.get_activated_adapters())
            if isinstance(module, ModulesToSaveWrapper):
                # Deactivation also freezes these, and loads the original module
                inactive.difference_update(module.modules_to_save)
        return inactive


class SwiftAdapter:

    _offloading = threading.local()

    @staticmethod
    @contextmanager
    def collect_garbage_once():
        """Within it, modules are offloaded without a garbage collection for each. There is one at the end."""
        state = SwiftAdapter._offloading
        if hasattr(state, 'has_garbage'):
            yield
            return
        state.has_garbage = False
        try:
            yield
        finally:
            has_garbage = state.has_garbage
            del state.has_garbage
            if has_garbage:
                gc_collect()
