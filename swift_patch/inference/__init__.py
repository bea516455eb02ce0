"""`swift-patch infer`: one fused adapter per line of a dataset, generated with ms-swift's own engine.

`dataset` reads and checks the JSONL, `adapters` finds, checks and loads the LoRAs, `run` puts both together.
Nothing here imports torch or swift before it is used, so that mistakes in the input are reported at once.
"""
