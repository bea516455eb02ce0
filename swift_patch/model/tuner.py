"""What has the adapters of a model: PEFT's `LoraModel`, or ms-swift's `SwiftModel`."""
import weakref
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import nn
from typing import Any, Dict

# The configs of the adapters that are to come, by model.
_configs: 'weakref.WeakKeyDictionary[nn.Module, Dict[str, Any]]' = weakref.WeakKeyDictionary()


def tuner_of(model: Any) -> Any:
    """Returns what has the adapters of a model: what a `PeftModel` holds as its `base_model`, or else the model."""
    return model.base_model if isinstance(model, PeftModel) else model


def tuner_around(model: nn.Module) -> LoraModel:
    """Returns PEFT's `LoraModel` around a model that has none, without an adapter. The modules stay as they are.

    PEFT itself makes one with an adapter in it alone. As in PEFT, all that are made around one model have the same
    configs of adapters.
    """
    tuner: Any = object.__new__(LoraModel)
    nn.Module.__init__(tuner)
    tuner.model = model
    tuner.targeted_module_names, tuner.targeted_parameter_names = [], []
    # It becomes an attribute of the model once there is an adapter.
    tuner.peft_config = getattr(model, 'peft_config', None) or _configs.setdefault(model, {})
    tuner.active_adapter = []
    return tuner
