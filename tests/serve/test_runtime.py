"""Adapters come and go while a server runs, from below the folders that were named and from nowhere else."""
import os
import pytest
import shutil
from local import BASE, config_of, local
from unittest import mock

KEY = {'Authorization': 'Bearer secret'}


@pytest.fixture(scope='module')
def folder(written, tmp_path_factory):
    """A folder with an adapter `new`, a broken one, one for another model, and links that lead out of it."""
    folder = tmp_path_factory.mktemp('adapters')
    paths = written[1]['peft']
    shutil.copytree(paths['l1'], folder / 'new')
    shutil.copytree(paths['l2'], folder / 'other')
    shutil.copytree(paths['l1'], folder / 'broken')
    (folder / 'broken' / 'adapter_model.safetensors').write_bytes(b'nothing')
    os.symlink(paths['l3'], folder / 'out')
    os.symlink(folder / 'circle', folder / 'circle')
    return folder


@pytest.fixture(scope='module')
def server(written, folder):
    with local(config_of(written, swift_args={'api_key': 'secret'}, adapter_folders=[str(folder)])) as found:
        found.http.headers = KEY
        yield found


def load(server, name, path, **more):
    return server.http.post('/v1/load_lora_adapter', json={'lora_name': name, 'lora_path': str(path), **more})


def unload(server, name):
    return server.http.post('/v1/unload_lora_adapter', json={'lora_name': name})


def test_an_adapter_comes_answers_and_goes(server, folder):
    assert server.post(model='new').status_code == 404
    response = load(server, 'new', folder / 'new')
    assert response.status_code == 200 and response.text == "Success: LoRA adapter 'new' added successfully."
    assert server.answer(model='new') == server.answer(model='l1')
    assert 'new' in [each['id'] for each in server.http.get('/v1/models').json()['data']]
    again = load(server, 'new', folder / 'other')
    assert again.status_code == 400 and 'exists' in again.json()['error']['message']
    assert load(server, 'new', folder / 'other', load_inplace=True).status_code == 200
    assert server.answer(model='new') == server.answer(model='l2')
    assert unload(server, 'new').status_code == 200
    assert server.post(model='new').status_code == 404 and unload(server, 'new').status_code == 404


@pytest.mark.parametrize('path', [
    '/etc', '..', '{folder}/../x', '{folder}/out', '{folder}/circle', '{outside}', '\0', 'x' * 5000, '', 'owner/name',
    '{folder}/new/../../x'
])  # yapf: disable
def test_no_path_leads_out_of_the_folders(server, folder, written, path):
    response = load(server, 'bad', path.format(folder=folder, outside=written[1]['peft']['l0']))
    assert response.status_code == 400 and 'below' in response.json()['error']['message']
    assert 'bad' not in server.deploy.library


@pytest.mark.parametrize('name', ['nothing', 'broken', '.'])
def test_what_is_no_adapter_is_refused_and_what_was_there_stays(server, folder, name):
    assert load(server, 'kept', folder / 'new').status_code == 200
    before = server.answer(model='kept')
    for wanted, more in (('bad', {}), ('kept', {'load_inplace': True})):
        assert load(server, wanted, folder / name, **more).status_code == 400
    assert 'bad' not in server.deploy.library
    assert server.answer(model='kept') == before
    assert unload(server, 'kept').status_code == 200


def test_while_what_comes_is_looked_at_what_was_there_answers(server, folder):
    assert load(server, 'kept', folder / 'new').status_code == 200
    before, during = server.answer(model='kept'), []
    composer = server.deploy.infer_engine.composer
    check = composer.check_checkpoint

    def checked(*args):
        during.append((server.answer(model='kept'), server.post(model='bad').status_code))
        check(*args)

    with mock.patch.object(composer, 'check_checkpoint', checked):
        for name in ('kept', 'bad'):
            assert load(server, name, folder / 'broken', load_inplace=True).status_code == 400
    assert during == [(before, 404)] * 2
    assert unload(server, 'kept').status_code == 200


@pytest.mark.parametrize('name', ['', BASE, 'fused'])
def test_a_name_that_means_something_else_is_refused(server, folder, name):
    response = load(server, name, folder / 'new')
    assert response.status_code == 400 and response.json()['error']['param'] == 'lora_name'


def test_nobody_without_the_key_adds_or_removes(server, folder):
    server.http.headers = {}
    try:
        assert load(server, 'new', folder / 'new').status_code == 401
        assert unload(server, 'l0').status_code == 401
    finally:
        server.http.headers = KEY
    assert 'l0' in server.deploy.library


def test_without_folders_nothing_comes_or_goes(written):
    with local(config_of(written)) as server:
        assert load(server, 'new', written[1]['peft']['l0']).status_code == 404
        assert unload(server, 'l0').status_code == 404


def test_folders_without_a_key_are_refused(written, folder):
    from swift_patch.serve.run import make_server
    with pytest.raises(ValueError, match='--api_key'):
        make_server(config_of(written, adapter_folders=[str(folder)]))
    with pytest.raises(ValueError, match='nowhere'):
        make_server(config_of(written, adapter_folders=['nowhere'], swift_args={'api_key': 'secret'}))
