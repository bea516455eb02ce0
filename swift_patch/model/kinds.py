"""What PEFT would make, in one model, of adapters on disk by their configs."""
import copy
import json
import logging
import torch
from dataclasses import dataclass, fields
from itertools import repeat
from operator import attrgetter
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from typing import Any, Dict, FrozenSet, List, Optional, Tuple

from ..errors import joined, printable
from ..lora.checkpoint import AdapterCheckpoint
from .adapters import Adapters
from .arrangement import Arrangement, Factor, LayerFactors
from .index import View
from .layers import factors_of, groups_of, is_transposed
from .new_adapter import NEW_NAME, injected_copy, remember_layers
from .offload import device_of

logger = logging.getLogger(__name__)

_parameters_of = attrgetter('_parameters')
_dtype_of, _device_of_tensor = attrgetter('dtype'), attrgetter('device')

# What says how an adapter was initialised, or what ms-swift and newer releases of PEFT have in a config besides: of no
# use to an adapter whose values are known.
_UNUSED = ('eva_config', 'corda_config', 'loftq_config', 'lora_ga_config', 'megatron_config', 'arrow_config',
           'swift_type', 'peft_type', 'peft_version', 'lr_ratio', 'model_key_mapping', 'lorap_lr_ratio', 'lorap_emb_lr',
           'enable_lora')
# What says where an adapter comes from.
_ABOUT_TRAINING = ('base_model_name_or_path', 'revision', 'auto_mapping', 'inference_mode')
_SETS = ('target_modules', 'exclude_modules')


@dataclass(frozen=True, eq=False)
class StoredKind:
    """What PEFT would make, in one model, of stored adapters with one config.

    Attributes:
        config: the config, as PEFT would keep it. Nobody may change it.
        layout: the layers, and where their factors lie once they are read.
        scalings: the scaling in each.
        embeddings: the names of the layers that are embeddings.
        bases: the places of the layers' base layers in the index, and their dtypes and devices.
    """
    config: LoraConfig
    layout: Arrangement
    scalings: List[float]
    embeddings: FrozenSet[str]
    bases: Tuple[List[int], List[Any]]

    def is_current(self, adapters: Adapters) -> bool:
        """Returns whether the base layers have the dtypes and devices that they had. A call looks at them once."""
        if self not in adapters.kinds:
            if _facts(adapters.view, self.bases[0]) != self.bases[1]:
                return False
            adapters.kinds.add(self)
        return True

    def is_like(self, other: 'StoredKind') -> bool:
        """Returns whether adapters of both are merged alike."""
        return self is other or (self.config == other.config and self.layout.is_like(other.layout)
                                 and self.scalings == other.scalings)


def kind_of(adapters: Adapters, checkpoint: AdapterCheckpoint) -> StoredKind:
    """Returns what PEFT would make of an adapter. Raises ValueError where that is nothing."""
    # By the bytes of the file first: nearly all files of one kind are the same.
    of_file = 'stored', checkpoint.content
    found: Optional[StoredKind] = adapters.memory.known(of_file)
    if found is not None and found.is_current(adapters):
        return found
    key = 'stored', _key_of(checkpoint)
    found = adapters.memory.known(key)
    if found is None or not found.is_current(adapters):
        config = _config_of(adapters, checkpoint)
        init, config.init_lora_weights = config.init_lora_weights, False
        try:
            layers = injected_copy(adapters, config)
        except Exception as e:  # a config may hold values of any type, and PEFT then raises whatever comes
            raise ValueError(
                f'{checkpoint} does not fit this base model: {printable(" ".join(str(e).split())):.1000}') from e
        config.init_lora_weights = init
        parameters = getattr(config, 'target_parameters', None)
        if parameters or not layers.keys() <= adapters.view.index.order.keys():
            raise ValueError(f'{checkpoint} is expected to target modules of this base model, found that PEFT makes '
                             f'parameters of them ({joined(list(parameters or layers))}), which cannot be merged.')
        remember_layers(adapters, config, frozenset(layers))
        facts, scalings, embeddings = [], {}, []
        for name, layer in layers.items():
            pair = factors_of(layer, NEW_NAME)
            if pair is None:
                raise ValueError(f'{checkpoint} is expected to have A and B in each layer, found none in {name!r}.')
            device = device_of(adapters.view, name) or torch.device('cpu')
            A, B = (Factor(factor.shape, factor.dtype, device) for factor in pair)
            facts.append(LayerFactors(name, A, B, groups_of(layer), is_transposed(layer)))
            scalings[name] = float(layer.scaling[NEW_NAME])
            if NEW_NAME in layer.lora_embedding_A:
                embeddings.append(name)
        layout = Arrangement(facts)
        bases = [_place_of_base(adapters.view, name) for name in layout.names]
        found = adapters.memory.remember_new(
            key,
            StoredKind(config, layout, [scalings[name] for name in layout.names], frozenset(embeddings),
                       (bases, _facts(adapters.view, bases))))
    return adapters.memory.remember_new(of_file, found)


def _key_of(checkpoint: AdapterCheckpoint) -> str:
    """Returns what tells one kind of adapters from another: trainings that differ in nothing else share it."""
    config = _options(checkpoint)
    for name, value in config.items():
        if name in _SETS and isinstance(value, list):
            # PEFT writes a set in any order.
            config[name] = sorted(map(str, value))
    # Not the keys of patterns: the first that matches a layer counts.
    return json.dumps(sorted(config.items()), default=repr)


def _options(checkpoint: AdapterCheckpoint) -> Dict[str, Any]:
    """Returns the options of a checkpoint that matter. What is null is not given: PEFT's default may be False."""
    return {
        name: value
        for name, value in checkpoint.config.items() if value is not None and name not in _UNUSED + _ABOUT_TRAINING
    }


def _place_of_base(view: View, name: str) -> int:
    """Returns the place of a layer, or of the one that LoRA layers wrap there."""
    order = view.index.order
    while isinstance(view.modules[order[name]], LoraLayer):
        name += '.base_layer'
    return order[name]


def _facts(view: View, places: List[int]) -> List[Any]:
    """Returns what changes of layers where a model is cast or moved, while its modules stay."""
    # In C, for this is asked for every sample. A layer that has no weight, as when it is quantized, has none here, too.
    parameters = map(_parameters_of, map(view.modules.__getitem__, places))
    weights = [weight for weight in map(dict.get, parameters, repeat('weight')) if weight is not None]
    return [*map(_dtype_of, weights), *map(_device_of_tensor, weights)]


def _config_of(adapters: Adapters, checkpoint: AdapterCheckpoint) -> LoraConfig:
    """Returns the config of a checkpoint as the tuner of the model has configs."""
    config_class: Any = LoraConfig
    if not isinstance(adapters.tuner, LoraModel):
        # Only ms-swift has other tuners; PEFT alone shall not need it.
        from swift.tuners import LoRAConfig
        config_class = LoRAConfig
    known = {item.name for item in fields(config_class) if item.init}
    given = _options(checkpoint)
    unknown = [name for name, value in given.items() if name not in known and value]
    if unknown:
        logger.warning(f'{checkpoint} has options that the installed PEFT does not know, which are ignored: '
                       f'{joined(unknown)}.')
    # PEFT changes a config, and adapters whose files are alike share one.
    given = copy.deepcopy({name: value for name, value in given.items() if name in known})
    if isinstance(given.get('init_lora_weights'), str):
        given['init_lora_weights'] = True
    try:
        config = config_class(**{**given, 'inference_mode': True})
        for option in _SETS:
            # JSON has no sets, and PEFT's `add_weighted_adapter` takes nothing else.
            if isinstance(getattr(config, option, None), list):
                setattr(config, option, set(getattr(config, option)))
    except Exception as e:  # see above
        raise ValueError(f'{checkpoint} has a config that PEFT does not take: {type(e).__name__}: {e}') from e
    return config
