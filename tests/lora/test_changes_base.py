"""Whether a LoRA fits the base weights as they are is asked of the installed PEFT, with ms-swift's changes to it."""
import pytest
import subprocess
import sys
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from swift.tuners import Swift  # noqa: F401

from swift_patch.lora.changes_base import changes_base, why_changed_base

HAS_LORA_GA = hasattr(LoraConfig, 'lora_ga_config')


@pytest.mark.parametrize('init', [None, True, False, 'gaussian', 'eva', 'orthogonal'])
def test_what_is_put_into_a_and_b_alone_leaves_base_weights(init: object) -> None:
    assert not changes_base(init) and why_changed_base(init) == ''


@pytest.mark.skipif(not hasattr(LoraLayer, 'mica_init'), reason='this PEFT has none')
def test_a_way_that_this_package_has_never_heard_of_is_asked_of_peft() -> None:
    assert not changes_base('mica')


@pytest.mark.parametrize('init', ['pissa', 'pissa_niter_4', 'olora', 'OLoRA', 'corda', 'loftq'])
def test_what_changes_base_weights_is_told(init: str) -> None:
    assert why_changed_base(init) == 'which changes the base model; give the converted checkpoint'


@pytest.mark.parametrize('init', ['lora_ga', 'lora-ga'])
def test_what_needs_data_is_taken_for_a_change(init: str) -> None:
    told = 'which changes the base model' if HAS_LORA_GA else 'of which the installed PEFT cannot say whether'
    assert why_changed_base(init).startswith(told)


@pytest.mark.parametrize('init', ['of_a_later_release', 'true', 'pissa_niter_x', '\x1b[31m'])
def test_what_peft_does_not_know_is_taken_for_a_change_and_told_with_what_to_do(init: str) -> None:
    why = why_changed_base(init)
    assert changes_base(init) and why.isprintable()
    assert why.startswith('of which the installed PEFT cannot say whether it changes the base model (')
    assert why.endswith('; give the converted checkpoint, or install the PEFT that it was trained with')


def test_asking_changes_nobodys_random_numbers_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    with torch.device('meta'), torch.inference_mode():
        assert changes_base('pissa_niter_7')
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr('peft.LoraModel', None)
    assert changes_base('pissa_niter_7') and 'cannot say' not in why_changed_base('pissa_niter_7')


def test_torch_is_not_imported_where_nothing_is_asked() -> None:
    code = ('import importlib.util, sys\n'
            'spec = importlib.util.spec_from_file_location("changes_base", sys.argv[1])\n'
            'module = importlib.util.module_from_spec(spec)\n'
            'spec.loader.exec_module(module)\n'
            'assert not module.changes_base(True) and not module.changes_base(None)\n'
            'assert "torch" not in sys.modules and "peft" not in sys.modules')
    file = sys.modules[changes_base.__module__].__file__
    subprocess.run([sys.executable, '-c', code, str(file)], check=True)
