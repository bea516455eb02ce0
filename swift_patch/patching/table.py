"""What is replaced where: one table."""
from typing import NamedTuple

from .releases import installed


class Patch(NamedTuple):
    """One attribute that is replaced.

    Attributes:
        after: the module whose import is waited for; the classes are complete then.
        module: where the class is.
        target: the class and the attribute.
        source: `module:function` of this package, which takes its place. One of `patching.fixes` is given the original
            and returns what takes its place, see there.
    """
    after: str
    module: str
    target: str
    source: str

    @property
    def is_fix(self) -> bool:
        """Whether stock cannot run without it."""
        return self.source.startswith('patching.fixes:')


# Where ms-swift has its engine: in ms-swift 3 elsewhere. Its version is asked, for importing it is not ours to do.
_ENGINE, _ENGINE_CLASS = (('swift.llm.infer.infer_engine.pt_engine', 'PtEngine') if
                          (installed('ms-swift') or '').startswith('3.') else
                          ('swift.infer_engine.transformers_engine', 'TransformersEngine'))

PATCHES = (
    Patch('peft', 'peft.tuners.lora.model', 'LoraModel.add_weighted_adapter', 'model.methods:add_weighted_adapter'),
    Patch('peft', 'peft.tuners.lora.model', 'LoraModel.update_weighted_adapter',
          'model.methods:update_weighted_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.add_weighted_adapter',
          'model.methods:swift_add_weighted_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.update_weighted_adapter',
          'model.methods:update_weighted_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.set_active_adapters',
          'model.activation:set_active_adapters'),
    Patch('swift.tuners.base', 'swift.tuners.lora', 'LoRA.activate_adapter', 'model.activation:activate_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.utils', 'SwiftAdapter.offload', 'model.activation:offload_module'),
    Patch('swift.tuners.base', 'swift.tuners.lora_layers', 'LoraModel._create_new_module',
          'patching.fixes:create_new_module'),
    Patch('swift.tuners.base', 'swift.tuners.lora_layers', 'LoraModel._create_and_replace',
          'patching.fixes:create_and_replace'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.load_state_dict', 'patching.fixes:load_state_dict'),
    Patch(_ENGINE, _ENGINE, f'{_ENGINE_CLASS}._infer', 'patching.fixes:infer_batch'),
    Patch(_ENGINE, _ENGINE, f'{_ENGINE_CLASS}._get_adapter_names', 'patching.fixes:adapter_names'),
)
