"""Fused adapters in place: what is patched into ms-swift and PEFT, and what `swift-patch upstream` adds to ms-swift."""
