"""Which adapter of vLLM's the name of a model asks for: one that is merged for the request."""
import asyncio
from typing import Any, Iterable, Optional
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ..errors import without_paths
from ..serve.errors import RequestError
from ..serve.mixture import asked_for
from .loads import Loads
from .mixtures import Mixtures
from .settings import Settings


class MixtureResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Makes requests for adapters of models like `sql`, `sql=0.6,math=0.4` and `sql,math,merge_method=mixture`.

    Args:
        engine: vLLM's client of the engine.
        bases: what the base model is called.
        settings: the adapters, and how they are merged.

    Raises:
        ValueError: an adapter is called as the base model is, or Transformers has no such model.
    """

    def __init__(self, engine: Any, bases: Iterable[str], settings: Settings):
        self._settings, self._bases = settings, list(bases)
        taken = next((base for base in self._bases if base in settings.library), None)
        if taken is not None:
            raise ValueError(f'The base model is called {taken!r}, but so is an adapter: give --served-model-name.')
        model_config, lora_config = engine.vllm_config.model_config, engine.vllm_config.lora_config
        self._mixtures = Mixtures(model_config.hf_config, model_config.dtype, settings.library,
                                  **settings.composer_args)
        self._mixtures.max_lora_rank = lora_config.max_lora_rank
        self._loads = Loads(engine, lora_config.max_cpu_loras)

    @property
    def names(self) -> 'list[str]':
        """The adapters that there are."""
        return list(self._settings.library)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Optional[LoRARequest]:
        """Returns vLLM's request for what a name asks for, None where it is no adapter and no mixture.

        Args:
            base_model_name: the base model, which there is one of.
            lora_name: the name.

        Raises:
            VLLMNotFoundError: there is no such adapter in a mixture.
            VLLMValidationError: the mixture is none, or cannot be merged.
        """
        # It looks at files.
        return await asyncio.get_running_loop().run_in_executor(None, self._request, lora_name)

    async def loaded(self, lora_name: str) -> Optional[LoRARequest]:
        """Returns what `resolve_lora` does, once the engine has it.

        Args:
            lora_name: the name.

        Raises:
            VLLMNotFoundError: see `resolve_lora`.
            VLLMValidationError: see `resolve_lora`, or the engine cannot load it.
            EngineDeadError: the engine has ended.
        """
        error: Optional[ValueError] = None
        # Once more where files were replaced between the look at them and the merge.
        for _ in range(2):
            found = await self.resolve_lora('', lora_name)
            if found is None:
                return None
            try:
                await self._loads.load(found)
                return found
            except ValueError as e:
                error = e
        raise self._refused(lora_name, str(error)) from error

    def _request(self, name: str) -> Optional[LoRARequest]:
        library = self._settings.library
        if name not in library and '=' not in name and ',' not in name:
            return None
        try:
            mixture = asked_for(name, self._bases[0], library)
        except RequestError as e:
            if e.status == 404:
                raise VLLMNotFoundError(str(e)) from e
            raise VLLMValidationError(str(e), parameter='model', value=name) from e
        if len(mixture.adapters) > self._settings.max_sources:
            raise self._refused(
                name, f'At most {self._settings.max_sources} adapters are expected in one request, found '
                f'{len(mixture.adapters)}.')
        try:
            return self._mixtures.request(self._mixtures.composer.composition(*mixture), mixture.named(self._bases[0]))
        except (TypeError, ValueError) as e:
            raise self._refused(name, str(e)) from e

    def _refused(self, name: str, reason: str) -> VLLMValidationError:
        library = self._settings.library
        paths = [str(library.path(adapter)) for adapter in asked_for(name, self._bases[0], library).adapters]
        return VLLMValidationError(without_paths(reason, paths), parameter='model', value=name)
