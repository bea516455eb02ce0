"""What a vLLM that cannot serve a folder of adapters says instead of serving, and settings of one that can."""
import json
import pytest
from pathlib import Path
from vllm_asking import asked_at_once, drawn
from vllm_server import SMALL, serving_vllm


def refused(*args, **environment):
    """Returns what is said."""
    with pytest.raises(RuntimeError) as raised:
        with serving_vllm(*args, **environment):
            pass
    return str(raised.value)


def test_a_rank_that_no_slot_holds_is_refused_with_the_number_to_set(written):
    model, paths = written
    told = refused(model, *SMALL, '--max-lora-rank', '1', SWIFT_PATCH_ADAPTERS=Path(paths['peft']['l0']).parent)
    assert '--max-lora-rank is expected to be 8' in told


def test_a_folder_that_is_none_is_refused(written, tmp_path):
    told = refused(written[0], *SMALL, SWIFT_PATCH_ADAPTERS=tmp_path / 'nothing')
    assert f"{tmp_path / 'nothing'}" in told


def test_a_combination_type_is_that_of_all_mixtures(written, oracle, tmp_path):
    model, paths = written
    manifest = tmp_path / 'adapters.jsonl'
    manifest.write_text(''.join(
        json.dumps({
            'name': name,
            'path': path
        }) + '\n' for name, path in paths['peft'].items()))
    expected = drawn(oracle, 16, seed=1, merge_methods=('linear', ))
    with serving_vllm(
            model, *SMALL, '--max-lora-rank', '8', SWIFT_PATCH_ADAPTERS=manifest,
            SWIFT_PATCH_COMBINATION_TYPE='linear') as server:
        assert dict(zip(expected, asked_at_once(server, expected))) == expected
