import json, os, sys, time, random
import pytest
from pathlib import Path
import forked
from test_run import make_config, command_line, SAMPLES

def child(conn, argv):
    conn.send(('imported', time.time()))
    from swift_patch import cli
    from swift_patch.inference import engine, run
    from swift_patch.composer import FusionComposer
    import swift.pipelines.utils as u
    from swift.infer_engine import TransformersEngine
    conn.send(('starting', time.time()))
    def tell(owner, name, phase):
        orig = getattr(owner, name)
        def told(*a, **k):
            conn.send((phase, time.time()))
            return orig(*a, **k)
        setattr(owner, name, told)
    tell(u, 'prepare_model_template', 'model')
    tell(engine, 'load_adapters', 'adapters')
    tell(FusionComposer, 'reserve', 'reserve')
    tell(FusionComposer, 'compose', 'compose')
    tell(TransformersEngine, 'infer', 'infer')
    tell(run, '_write_line', 'write')
    r = cli.main(argv)
    conn.send(('end', time.time()))
    sys.exit(r)

def test_x(model_dir, checkpoints, tmp_path):
    config = make_config(model_dir, checkpoints, tmp_path)
    for i in range(3):
        t = time.time()
        r, s = forked.pipe()
        p = forked.start(child, tmp_path / 'log', s, ['infer', *command_line(config), '--overwrite'])
        s.close()
        print('start', time.time() - t)
        while True:
            try:
                m, when = r.recv()
            except EOFError:
                break
            print(m, round(when - t, 3))
        p.join()
        print(p.exitcode)
        if i == 0: print((tmp_path / 'log').read_text()[-3000:])
