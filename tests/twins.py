"""One of two models that go through the same history, and what a step may do to it."""
import copy
import torch
from collections import OrderedDict
from contextlib import contextmanager
from models import layers
from peft import PeftModel
from swift.tuners.utils import OffloadHelper
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.model import activation
from swift_patch.model.layers import adapter_containers, factors_of

__all__ = ['FusionComposer', 'Side', 'activation', 'adapter_containers', 'factors_of', 'put_a_layer_into']


class Side:
    """One of the twins.

    Attributes:
        wrappers: the model, and the further wrappers around it in the order in which they were made.
        helper: the files of what is offloaded. ms-swift names them by adapter and layer alone, for all models.
        composer: a composer of the model, on the patched side.
        held: by holder, tensors outside of the model that share memory with a source.
    """

    def __init__(self, model):
        self.helper = OffloadHelper()
        self.renew([model])

    def renew(self, wrappers):
        """Goes on with another model, of which nobody holds anything."""
        self.wrappers, self.composer, self.held = wrappers, None, []

    def base(self):
        """The base model."""
        model = self.wrappers[0]
        return model.base_model.model if isinstance(model, PeftModel) else model.base_model

    def layers(self):
        return layers(self.wrappers[0])

    def factors(self, adapter):
        """By layer."""
        found = {name: factors_of(layer, adapter) for name, layer in self.layers().items()}
        return {name: pair for name, pair in found.items() if pair is not None}

    def is_offloaded(self):
        return any(parameter.is_meta for parameter in self.wrappers[0].parameters())

    @contextmanager
    def loaded(self, adapters):
        """Within it, what is offloaded of the adapters is on its device."""
        offloaded = [(layer, adapter) for layer in self.layers().values() for adapter in dict.fromkeys(adapters)
                     if (pair := factors_of(layer, adapter)) is not None and pair.A.is_meta]
        for layer, adapter in offloaded:
            layer.save_memory(adapter, True)
        try:
            yield
        finally:
            for layer, adapter in offloaded:
                if factors_of(layer, adapter) is not None:
                    layer.save_memory(adapter, False, 'meta')

    def parameters(self, adapter):
        """The adapter's parameters that are not offloaded, in the order of the model."""
        return [parameter for pair in self.factors(adapter).values() for parameter in pair if not parameter.is_meta]

    def share(self, adapter, how):
        """Makes others hold memory of an adapter: a flat buffer, its tensors in a state_dict, or views of them."""
        parameters = self.parameters(adapter)
        if how == 'buffer' and len({parameter.dtype for parameter in parameters}) == 1:
            holders = [torch.cat([parameter.detach().flatten() for parameter in parameters])]
            nn.utils.vector_to_parameters(holders[0], parameters)
        elif how == 'state_dict':
            holders = [
                value for key, value in self.base().state_dict().items() if f'.{adapter}.' in key and not value.is_meta
            ]
        else:
            holders = [parameter.detach()[:1] for parameter in parameters]
        self.held.append(holders)

    def make_scalings_tensors(self, adapters):
        """As PEFT's `prepare_model_for_compiled_hotswap`."""
        for layer in self.layers().values():
            for adapter in set(adapters) & layer.scaling.keys():
                layer.scaling[adapter] = torch.tensor(float(layer.scaling[adapter]))

    def take_over(self, adapter, other):
        """Gives a fused adapter the layers, the ranks and the scalings that it has on the other side."""
        others = other.layers()
        for name, layer in self.layers().items():
            containers = adapter_containers(layer)
            for attribute, container in adapter_containers(others[name]).items():
                if adapter in container:
                    containers[attribute][adapter] = copy.deepcopy(container[adapter])


def put_a_layer_into(base, number, dtype=torch.float32):
    """Puts a layer `task` into a module of a base model that had none."""
    torch.manual_seed(number)
    width = base.model.embed_tokens.weight.shape[1]
    base.heads[f'head{number}'] = nn.Sequential(OrderedDict(task=nn.Linear(width, width).to(dtype)))
