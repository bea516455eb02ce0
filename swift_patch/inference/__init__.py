"""`swift-patch infer`: one fused adapter per line of a dataset, generated with ms-swift's own engine.

`dataset` reads and checks the JSONL, `checkpoints` finds and checks the LoRAs, `loading` loads them, `results` has the
result file, `run` puts all together.
Nothing here imports torch or swift before it is used, so that mistakes in the input are reported at once.
"""
