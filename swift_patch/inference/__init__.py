"""`swift-patch infer`: one fused adapter per sample of a dataset, generated with ms-swift's own engine.

In the order of a run: `samples` and `dataset` read what is asked, `checkpoints` and `hub` find the LoRAs, `arguments`
has ms-swift's, and `plan` puts these together. `batches` says what is answered together, and `generator` answers, on
the processes that `ranks` finds. `results` has the file, `metrics` compares it with labels, and `run` leads through
all of it. `options` are those of `swift infer`; `engine` and `loading` load models, also for measuring.
Nothing here imports torch or swift before it is used, so that mistakes in the input are reported at once.
"""
