"""Three small changes to ms-swift, and the code that makes them in a checkout: `swift-patch upstream`.

`fix.py`, `activation.py` and `refill.py` have what each adds, in ms-swift's manner; `edits.py` where it goes; `files/`
the text, the test and the documentation that go with it.
"""
