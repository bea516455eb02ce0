"""What some releases of ms-swift need in order to run at all with some of PEFT, and to load what they saved.

Each function is given the original and returns what takes its place: the original itself, where nothing needs fixing,
as in an ms-swift with the part `fix` of `swift-patch upstream`.
"""
import inspect
from contextlib import contextmanager
from functools import partial, wraps
from peft.tuners.lora import Embedding, LoraConfig, LoraLayer
from torch import nn, random
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional

# Before the names in a checkpoint of PEFT.
_PEFT_PREFIX = 'base_model.model.'


def create_new_module(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `LoraModel._create_new_module` of ms-swift that gives PEFT's LoRA layers all arguments they demand.

    Needed by ms-swift up to 4.6 with PEFT 0.19 and later; `original` itself is returned where it is not.
    """
    if not layer_arguments(Embedding.__init__, LoraConfig()) or _makes_layers(original):
        return original

    @wraps(original)
    def create(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        return original(lora_config, adapter_name, target, **{
            **layer_arguments(Embedding.__init__, lora_config),
            **kwargs
        })

    return create


def _makes_layers(create_new_module: Callable[..., Any]) -> bool:
    """Whether ms-swift itself gives all that the installed PEFT demands, as a later release may. Tried, not guessed."""
    from swift.tuners.lora import LoRAConfig
    arguments = dict.fromkeys(
        ('fan_in_fan_out', 'init_lora_weights', 'use_rslora', 'use_dora', 'loaded_in_8bit', 'loaded_in_4bit'), False)
    # Nobody's random numbers change by an import.
    with random.fork_rng(devices=[]):
        try:
            create_new_module(
                LoRAConfig(), 'a', nn.Linear(1, 1), current_key='a', r=1, lora_alpha=1, lora_dropout=0.0, **arguments)
        except Exception:
            return False
    return True


def create_and_replace(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `LoraModel._create_and_replace` of ms-swift that gives `update_layer` all arguments it demands.

    Needed by ms-swift up to 4.6 with PEFT 0.14 and later; `original` itself is returned where it is not.
    """
    if not layer_arguments(Embedding.update_layer, LoraConfig()) or _extends_layers(original):
        return original

    @wraps(original)
    def create(self: Any, lora_config: LoraConfig, adapter_name: str, target: nn.Module, *args: Any,
               **kwargs: Any) -> None:
        with _completed(target, lora_config):
            original(self, lora_config, adapter_name, target, *args, **kwargs)

    return create


def _extends_layers(create_and_replace: Callable[..., Any]) -> bool:
    """Whether ms-swift itself gives `update_layer` all that the installed PEFT demands. Tried on a hollow layer."""
    from swift.tuners.lora import LoRAConfig
    given: Dict[str, Any] = {}

    @wraps(Embedding.update_layer)
    def update_layer(*args: Any, **kwargs: Any) -> None:
        given.update(kwargs)

    layer = Embedding.__new__(Embedding)
    nn.Module.__init__(layer)
    layer.__dict__['update_layer'] = update_layer
    lora_model = SimpleNamespace(model=nn.Module(), _convert_dtype=lambda *_: None)
    try:
        create_and_replace(lora_model, LoRAConfig(), 'a', layer, 'a', None, current_key='a')
    except Exception:
        return False
    return given.keys() >= layer_arguments(Embedding.update_layer, LoraConfig()).keys()


@contextmanager
def _completed(target: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Within it, `update_layer` of a LoRA layer need not be given what `layer_arguments` returns."""
    if not isinstance(target, LoraLayer):
        yield
        return
    target.__dict__['update_layer'] = partial(target.update_layer, **layer_arguments(target.update_layer, config))
    try:
        yield
    finally:
        del target.__dict__['update_layer']


def load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `SwiftModel.load_state_dict` that loads the LoRAs of embeddings.

    Needed by ms-swift up to 4.6, which takes their names for those of a PEFT checkpoint, puts the adapter's name in a
    second time and then passes over them; `original` itself is returned where it does not.
    """
    loaded: Dict[str, Any] = {}
    stand_in = SimpleNamespace(
        adapters={'a': SimpleNamespace(config=None, load_state_dict_callback=None)},
        base_model=SimpleNamespace(load_state_dict=lambda state_dict, strict: loaded.update(state_dict)))
    original(stand_in, {'lora_embedding_A.a': None}, adapter_name='a')
    if 'lora_embedding_A.a' in loaded:
        return original

    @wraps(original)
    def load(self: Any, state_dict: Dict[str, Any], strict: bool = True, adapter_name: Optional[str] = None) -> None:
        if adapter_name is not None:
            state_dict = load_embeddings(self.base_model, state_dict, adapter_name)
        original(self, state_dict, strict, adapter_name)

    return load


def layer_arguments(method: Callable[..., Any], config: LoraConfig) -> Dict[str, Any]:
    """Returns what PEFT demands of those who make or extend a LoRA layer, and ms-swift 4.6 and older do not give.

    Since PEFT 0.19 that is the config, from which a layer reads what were arguments before; in PEFT 0.14 to 0.18 it is
    `lora_bias`, of the second adapter of an embedding or a convolution (False: ms-swift leaves it out elsewhere, too).

    Args:
        method: `__init__` or `update_layer` of a LoRA layer.
        config: The config of the adapter that the layer is to have.
    """
    parameters = inspect.signature(method).parameters
    return {
        name: value
        for name, value in (('config', config), ('lora_bias', False))
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }


def load_embeddings(model: nn.Module, state_dict: Dict[str, Any], adapter_name: str) -> Dict[str, Any]:
    """Loads what a checkpoint has for the LoRA of embeddings, in ms-swift's format or in PEFT's.

    Returns:
        The rest of it, with what there is no embedding for in the model.
    """
    places = {}
    for key in state_dict:
        place = key[len(_PEFT_PREFIX):] if key.startswith(_PEFT_PREFIX) else key
        if place.endswith(('lora_embedding_A', 'lora_embedding_B')):
            place = f'{place}.{adapter_name}'
        if place.endswith((f'lora_embedding_A.{adapter_name}', f'lora_embedding_B.{adapter_name}')):
            places[key] = place
    if not places:
        return state_dict
    found = model.load_state_dict({place: state_dict[key] for key, place in places.items()}, strict=False)
    unplaced = set(found.unexpected_keys)
    return {key: value for key, value in state_dict.items() if key not in places or places[key] in unplaced}


class _OfBatch(NamedTuple):
    """An adapter request, for `size` rows."""
    request: Any
    size: int


def infer_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an `_infer` of ms-swift's engine that tells `adapter_names` how many rows there are.

    Needed by ms-swift up to 4.6, which hands over one name for a whole batch, where PEFT wants one for each row
    (ms-swift issue 5285); `original` itself is returned where it cannot be told.
    """
    if 'pre_infer_hook' not in inspect.signature(original).parameters:
        return original

    @wraps(original)
    def infer(self: Any,
              infer_requests: Any,
              request_config: Any,
              *args: Any,
              pre_infer_hook: Any = None,
              **kwargs: Any) -> Any:

        def hook(arguments: Dict[str, Any]) -> Dict[str, Any]:
            mask = arguments['inputs'].get('attention_mask')
            if mask is not None and getattr(self._get_adapter_names, '__name__', '') == 'names_of_batch':
                config = arguments['generation_config']
                # Beams and several sequences are rows from the first forward on.
                sequences = getattr(config, 'num_return_sequences', None)
                each = 1 if sequences is None else max(config.num_beams or 1, sequences)
                asked = _OfBatch(arguments.get('adapter_request'), mask.shape[0] * each)
                arguments = {**arguments, 'adapter_request': asked}
            return arguments if pre_infer_hook is None else pre_infer_hook(arguments)

        return original(self, infer_requests, request_config, *args, pre_infer_hook=hook, **kwargs)

    return infer


def adapter_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `_get_adapter_names` of ms-swift's engine that gives a name for each row, see `infer_batch`."""
    if list(inspect.signature(original).parameters) != ['self', 'adapter_request']:
        return original

    # Under a name of its own, by which `infer_batch` knows it.
    def names_of_batch(self: Any, adapter_request: Any) -> Any:
        if not isinstance(adapter_request, _OfBatch):
            return original(self, adapter_request)
        found = original(self, adapter_request.request)
        return found if found is None or len(found) != 1 else found * adapter_request.size

    return names_of_batch
